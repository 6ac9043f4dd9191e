"""LoRA adapters: which there are (registry), what a PEFT folder says (peft_folder), how layers apply them (layers)."""
