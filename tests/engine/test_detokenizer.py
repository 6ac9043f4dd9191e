"""`detokenizer.py`: streamed pieces equal the whole decode, for every kind of vocabulary; stop strings."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from textgen_engine.detokenizer import Detokenizer, TextStream
from textgen_engine.request import OutputParams, StoppingParams

TEXTS = [
    "Hello, world! It's a test.",
    "  two leading spaces,\n\n\ttabs and newlines \n",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 😀😃😄",
    "日本語のテキストと中文文本，한국어 텍스트도",
    "العربية نص من اليمين إلى اليسار",
    "combining: é ạ̈ ก็ นี่ हिन्दी",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓀀𓂀 ﷽ \u200b\u200d\ufeff end",
    "def f(x):\n    return {'a': [1, 2, 3]}  # code",
    "a literal \ufffd in the text",
]
CORPUS = [
    "the quick brown fox jumps over the lazy dog and runs away from it all the time",
    "hello world, this is a small corpus to train a small vocabulary on; it's fine.",
    "streams of tokens become streams of text, one piece at a time",
] * 5

quick = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _byte_tokens() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _llama_like() -> PreTrainedTokenizerFast:
    """Llama 2's layout: BPE with byte fallback, and a decoder that strips the text's first space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *_byte_tokens()], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # The trainer enters its special tokens as added ones; in Llama's vocabulary, bytes are ordinary tokens.
    fresh = Tokenizer(models.BPE(**_bpe_parts(tokenizer), unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fresh.normalizer, fresh.decoder = tokenizer.normalizer, tokenizer.decoder
    return _fast(fresh)


def _bpe_parts(tokenizer: Tokenizer) -> dict[str, Any]:
    import json

    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def _gemma_like() -> PreTrainedTokenizerFast:
    """Gemma's layout: byte fallback, and every space is text."""
    tokenizer = _llama_like().backend_tokenizer
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _metaspace() -> PreTrainedTokenizerFast:
    """T5's layout: Unigram pieces with a marker for the space before a word."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.Metaspace()
    return _fast(tokenizer)


def _wordpiece() -> PreTrainedTokenizerFast:
    """BERT's layout, which no byte rule describes: decoded through the window."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.WordPiece()
    return _fast(tokenizer)


def _windowed_bytes() -> PreTrainedTokenizerFast:
    """Byte-level tokens behind a decoder that the byte rules do not know (a Replace that does nothing)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=350, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\x00\x00", "\x00\x00")])
    return _fast(tokenizer)


def _slow() -> ByT5Tokenizer:
    """A tokenizer written in Python, one token per byte; it drops what is no UTF-8 instead of showing U+FFFD."""
    return ByT5Tokenizer(bos_token="<s>")


BUILDERS = {
    "llama": _llama_like,
    "gemma": _gemma_like,
    "metaspace": _metaspace,
    "wordpiece": _wordpiece,
    "window": _windowed_bytes,
    "slow": _slow,
}
_BYTE_RULED = ("smollm2", "llama", "gemma", "metaspace")
_BYTE_FALLBACK = ("llama", "gemma")


@pytest.fixture(scope="module")
def tokenizers(model_dir: Path) -> dict[str, Any]:
    return {"smollm2": AutoTokenizer.from_pretrained(model_dir)} | {n: build() for n, build in BUILDERS.items()}


@pytest.fixture(scope="module")
def detokenizers(tokenizers: dict[str, Any]) -> dict[str, Detokenizer]:
    return {name: Detokenizer(tokenizer) for name, tokenizer in tokenizers.items()}


@pytest.fixture(params=["smollm2", *BUILDERS])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _stream(
    detokenizer: Detokenizer, prompt_ids: Sequence[int] = (), *, skip: bool = True, **stopping: Any
) -> TextStream:
    return detokenizer.stream(
        prompt_ids=prompt_ids, stopping=StoppingParams(**stopping), output=OutputParams(skip_special_tokens=skip)
    )


def _run(stream: TextStream, ids: Sequence[int], sizes: Sequence[int] = (1,)) -> list[str]:
    """Push `ids` in groups of `sizes` in turn; returns all deltas, the final one included."""
    deltas, start, turn = [], 0, 0
    while start < len(ids):
        size = sizes[turn % len(sizes)]
        delta = stream.push(ids[start : start + size])
        deltas.append(delta.text)
        if delta.stopped:
            break
        start, turn = start + size, turn + 1
    deltas.append(stream.finish())
    assert "".join(deltas) == stream.text
    return deltas


def _whole(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int], skip: bool) -> str:
    """The definition, by the tokenizer itself: what prompt + output has beyond the prompt."""
    before = tokenizer.decode(list(prompt_ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    whole = tokenizer.decode([*prompt_ids, *ids], skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    num_common = 0
    while num_common < min(len(before), len(whole)) and before[num_common] == whole[num_common]:
        num_common += 1
    return str(whole[num_common:])


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


# --- equality with the whole decode ---------------------------------------------------------------------------------


def test_each_vocabulary_takes_the_intended_way(detokenizers: dict[str, Detokenizer]) -> None:
    assert {name: d._rule is not None for name, d in detokenizers.items()} == {
        name: name in _BYTE_RULED for name in detokenizers
    }


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("skip", [True, False])
def test_real_texts(
    name: str, text: str, skip: bool, tokenizers: dict[str, Any], detokenizers: dict[str, Detokenizer]
) -> None:
    tokenizer = tokenizers[name]
    ids = _encode(tokenizer, text)
    for prompt in ("", "a prompt"):
        prompt_ids = [tokenizer.bos_token_id, *_encode(tokenizer, prompt)]
        for cut in {0, 1, len(ids) // 2}:
            border = [*prompt_ids, *ids[:cut]]
            if name in _BYTE_FALLBACK and "\ufffd" in tokenizer.decode(border):
                continue  # see test_random_bytes
            deltas = _run(_stream(detokenizers[name], border, skip=skip), ids[cut:])
            assert "".join(deltas) == _whole(tokenizer, border, ids[cut:], skip)


def test_text_survives_the_round_trip(tokenizers: dict[str, Any], detokenizers: dict[str, Detokenizer]) -> None:
    for name in ("smollm2", "llama", "gemma", "window", "slow"):
        for text in TEXTS:
            assert "".join(_run(_stream(detokenizers[name]), _encode(tokenizers[name], text))) == text, name


@quick
@given(data=st.data())
def test_random_ids(
    name: str, data: st.DataObject, tokenizers: dict[str, Any], detokenizers: dict[str, Detokenizer]
) -> None:
    """Random tokens, broken characters included, in groups of random size, after a random prompt."""
    tokenizer = tokenizers[name]
    token_id = st.integers(0, len(tokenizer) - 1)
    prompt_ids = data.draw(st.lists(token_id, max_size=6))
    ids = data.draw(st.lists(token_id, max_size=30))
    skip = data.draw(st.booleans())
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    deltas = _run(_stream(detokenizers[name], prompt_ids, skip=skip), ids, sizes)
    if name in _BYTE_FALLBACK:
        # Their own decode replaces whole runs of byte tokens: compared where all runs are whole characters, the
        # prompt's own included (what a character across the border becomes, test_random_bytes says).
        whole = _whole(tokenizer, prompt_ids, ids, skip)
        if not any("\ufffd" in tokenizer.decode(part) for part in (prompt_ids, [*prompt_ids, *ids])):
            assert "".join(deltas) == whole
    else:
        assert "".join(deltas) == _whole(tokenizer, prompt_ids, ids, skip)


@quick
@given(data=st.data())
def test_random_bytes(data: st.DataObject, tokenizers: dict[str, Any], detokenizers: dict[str, Detokenizer]) -> None:
    """Any bytes, cut into tokens anywhere, read as `bytes.decode(errors="replace")` reads them, border included."""
    name = data.draw(st.sampled_from(["smollm2", "llama", "gemma"]))
    tokenizer, detokenizer = tokenizers[name], detokenizers[name]
    by_bytes = {detokenizer.token_bytes(i): i for i in range(len(tokenizer)) if not detokenizer.is_special(i)}
    odd = st.sampled_from([b"\xf0\x9f\x98\x80", b"\xe4\xb8\xad", b"\xed\xa0\x80", b"\xff", b"\xc3", b"\xf0\x9f", b"x"])
    content = b"".join(data.draw(st.lists(st.one_of(odd, st.binary(max_size=3)), max_size=8)))
    content = bytes(byte for byte in content if bytes([byte]) in by_bytes)  # SmolLM2 lacks those UTF-8 never has
    ids = [by_bytes[bytes([byte])] for byte in content]
    border = data.draw(st.integers(0, len(ids)))
    word = _encode(tokenizer, "x")
    whole = content.decode("utf-8", "replace")
    before = content[:border].decode("utf-8", "replace")
    num_common = 0
    while num_common < min(len(before), len(whole)) and before[num_common] == whole[num_common]:
        num_common += 1
    deltas = _run(_stream(detokenizer, [*word, *ids[:border]]), ids[border:])
    assert "".join(deltas) == whole[num_common:]


def test_a_byte_run_keeps_its_valid_characters(
    tokenizers: dict[str, Any], detokenizers: dict[str, Detokenizer]
) -> None:
    tokenizer = tokenizers["llama"]
    ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "中".encode() + b"\xff"])
    assert tokenizer.decode(ids) == "\ufffd" * 4  # the library's own reading, which cannot be streamed
    assert _run(_stream(detokenizers["llama"]), ids) == ["", "", "中", "\ufffd", ""]


def test_no_delta_holds_half_a_character(tokenizers: dict[str, Any], detokenizers: dict[str, Detokenizer]) -> None:
    for name in ("smollm2", "llama", "gemma", "window"):
        for text in TEXTS[:-1]:
            deltas = _run(_stream(detokenizers[name]), _encode(tokenizers[name], text))
            assert not any("\ufffd" in delta for delta in deltas)


def test_an_unfinished_character_shows_only_at_the_end(
    tokenizers: dict[str, Any], detokenizers: dict[str, Detokenizer]
) -> None:
    for name in ("smollm2", "window"):
        ids = _encode(tokenizers[name], "😀")
        assert len(ids) > 1
        assert _run(_stream(detokenizers[name]), ids[:-1]) == [""] * (len(ids) - 1) + ["\ufffd"]


def test_a_character_begun_by_the_prompt_belongs_to_the_output(
    tokenizers: dict[str, Any], detokenizers: dict[str, Detokenizer]
) -> None:
    ids = _encode(tokenizers["smollm2"], "😀")
    letter = _encode(tokenizers["smollm2"], "a")
    assert "".join(_run(_stream(detokenizers["smollm2"], ids[:1]), ids[1:])) == "😀"
    # Never completed: the prompt's own text already shows U+FFFD for it.
    assert "".join(_run(_stream(detokenizers["smollm2"], ids[:1]), letter)) == "a"


def test_first_word_keeps_its_space(tokenizers: dict[str, Any], detokenizers: dict[str, Detokenizer]) -> None:
    for name in ("llama", "metaspace", "wordpiece"):
        tokenizer = tokenizers[name]
        word = _encode(tokenizer, "hello")
        assert "".join(_run(_stream(detokenizers[name], _encode(tokenizer, "the")), word)) == " hello"
        assert "".join(_run(_stream(detokenizers[name], [tokenizer.bos_token_id]), word)) == "hello"


def test_special_tokens(name: str, tokenizers: dict[str, Any], detokenizers: dict[str, Detokenizer]) -> None:
    tokenizer, detokenizer = tokenizers[name], detokenizers[name]
    eos = tokenizer.eos_token_id
    word = _encode(tokenizer, "time")
    assert detokenizer.is_special(eos)
    assert not detokenizer.is_special(word[0])
    assert detokenizer.token_text(eos) == tokenizer.eos_token
    assert tokenizer.eos_token not in "".join(_run(_stream(detokenizer), [*word, eos, *word]))
    assert tokenizer.eos_token in "".join(_run(_stream(detokenizer, skip=False), [*word, eos, *word]))
    delta = _stream(detokenizer).push([*word, eos])
    assert delta.token_texts[-1] == tokenizer.eos_token
    assert "".join(delta.token_texts[:-1]) == delta.text == "time"


def test_ids_beyond_the_tokenizer_are_empty(name: str, detokenizers: dict[str, Detokenizer]) -> None:
    detokenizer = detokenizers[name]
    for token_id in (10**6, 2**31 - 1, 2**40, -1):
        assert detokenizer.token_text(token_id) == ""
        assert not detokenizer.is_special(token_id)
        assert _run(_stream(detokenizer, [token_id]), [token_id, token_id]) == ["", "", ""]


def test_cost_does_not_grow_with_the_output(name: str, detokenizers: dict[str, Detokenizer]) -> None:
    """The second 2,000 tokens cost what the first 2,000 did (generous factor: the machine may be busy)."""
    rng = random.Random(0)
    stream = _stream(detokenizers[name], stop=("never seen", "\n\n\n\n"))
    ids = [rng.randrange(3, 140) for _ in range(4000)]
    durations = []
    for half in (ids[:2000], ids[2000:]):
        start = time.process_time()
        for token_id in half:
            stream.push([token_id])
        durations.append(time.process_time() - start)
    assert durations[1] < 3 * durations[0] + 0.05


def test_endless_nonsense_stays_cheap(tokenizers: dict[str, Any], detokenizers: dict[str, Detokenizer]) -> None:
    """A model that repeats a lone continuation byte shows U+FFFD as it goes, instead of holding all of it back."""
    for name in ("smollm2", "llama", "window"):
        detokenizer = detokenizers[name]
        tokenizer = tokenizers[name]
        token = "<0x80>" if name == "llama" else "Ģ"  # byte-level BPE writes byte 80 this way
        token_id = tokenizer.convert_tokens_to_ids(token)
        stream = _stream(detokenizer)
        shown = "".join(stream.push([token_id]).text for _ in range(1000))
        assert len(shown) > 900


# --- stop strings ---------------------------------------------------------------------------------------------------


def _letters(tokenizer: Any, text: str) -> list[int]:
    """One token per character."""
    return [token_id for character in text for token_id in _encode(tokenizer, character)]


def _stopped(
    detokenizer: Detokenizer, ids: Sequence[int], stop: Sequence[str], sizes: Sequence[int] = (1,), **stopping: Any
) -> tuple[str, bool]:
    stream = _stream(detokenizer, stop=tuple(stop), **stopping)
    _run(stream, ids, sizes)
    return stream.text, stream._ended and not stream._source.flush() and stream.finish() == ""


def _expected(text: str, stop: Sequence[str], include: bool = False) -> str:
    """The definition: read character by character; the first completed stop string ends the text."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if s and text[:end].endswith(s)]
        if found:
            return text[:end] if include else text[: end - max(map(len, found))]
    return text


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("Hello world, bye", ["wor"]),  # inside a token
        ("Hello world, bye", ["lo wo"]),  # across tokens
        ("Hello world", ["Hello"]),  # at the start
        ("Hello world", ["world"]),  # at the end
        ("price (5+5)*2 = [x].", ["(5+5)*"]),  # regex metacharacters
        ("a.b\\d+ $^", ["\\d+"]),
        ("line one\nline two\n\nparagraph", ["\n\n"]),
        ("日本語のテキスト", ["のテ"]),
        ("smile 😀 and 👩‍👧 end", ["👩\u200d"]),  # a part of a joined emoji
        ("combined é here", ["e"]),  # the letter under a combining mark
        ("abcdef", ["cde", "bcdef", "x"]),  # the one completed first wins
        ("abcdef", ["cd", "bcd", "abcd"]),  # of those completed together, the longest
        ("aabaabaac", ["aabaac"]),  # overlapping beginnings
        ("ababab", ["abac", "babb"]),  # only beginnings, never a stop string
        ("no stop here", []),
        ("empty is no stop string", [""]),
    ],
)
def test_stop_strings(
    text: str, stop: list[str], include: bool, tokenizers: dict[str, Any], detokenizers: dict[str, Detokenizer]
) -> None:
    tokenizer, detokenizer = tokenizers["smollm2"], detokenizers["smollm2"]
    for ids in (_encode(tokenizer, text), _letters(tokenizer, text)):
        for sizes in ((1,), (3,), (1000,)):
            stream = _stream(detokenizer, stop=tuple(stop), include_stop_str_in_output=include)
            _run(stream, ids, sizes)
            assert stream.text == _expected(text, stop, include)


@quick
@given(
    text=st.text(alphabet="ab\n😀", max_size=20),
    stop=st.lists(st.text(alphabet="ab\n😀", max_size=4), max_size=4),
    include=st.booleans(),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    whole_words=st.booleans(),
)
def test_stop_strings_by_definition(
    text: str,
    stop: list[str],
    include: bool,
    sizes: list[int],
    whole_words: bool,
    tokenizers: dict[str, Any],
    detokenizers: dict[str, Detokenizer],
) -> None:
    tokenizer = tokenizers["smollm2"]
    ids = _encode(tokenizer, text) if whole_words else _letters(tokenizer, text)
    stream = _stream(detokenizers["smollm2"], stop=tuple(stop), include_stop_str_in_output=include)
    deltas = _run(stream, ids, sizes)
    expected = _expected(text, stop, include)
    assert stream.text == expected
    # No prefix that was ever shown held a part of what the stop string cut off.
    shown = ""
    for delta in deltas:
        shown += delta
        assert expected.startswith(shown)


def test_what_may_become_a_stop_string_is_held_back(
    tokenizers: dict[str, Any], detokenizers: dict[str, Detokenizer]
) -> None:
    stream = _stream(detokenizers["smollm2"], stop=("END.",))
    texts = [stream.push([token_id]).text for token_id in _letters(tokenizers["smollm2"], "xENENDx")]
    assert texts == ["x", "", "", "EN", "", "", "ENDx"]
    assert stream.finish() == ""
    stream = _stream(detokenizers["smollm2"], stop=("END.",))
    assert stream.push(_letters(tokenizers["smollm2"], "xEND")).text == "x"
    assert stream.finish() == "END"


def test_tokens_after_the_stop_do_not_count(tokenizers: dict[str, Any], detokenizers: dict[str, Detokenizer]) -> None:
    stream = _stream(detokenizers["smollm2"], stop=("c",))
    delta = stream.push(_letters(tokenizers["smollm2"], "abcde"))
    assert (delta.text, delta.stopped, delta.num_tokens, delta.token_texts) == ("ab", True, 3, ["a", "b", "c"])
    assert stream.finish() == ""


def test_min_new_tokens(tokenizers: dict[str, Any], detokenizers: dict[str, Detokenizer]) -> None:
    ids = _letters(tokenizers["smollm2"], "abcabcabc")

    def text(minimum: int, *stop: str) -> str:
        stream = _stream(detokenizers["smollm2"], stop=stop, min_new_tokens=minimum)
        _run(stream, ids)
        return stream.text

    assert text(2, "b") == "a"
    assert text(3, "b") == "abca"
    assert text(5, "ca") == "abcab"
    assert text(4, "ca") == "ab"
    assert text(6, "b", "abcd") == "abcabca"  # "b" is passed over although "ab" was still held back
    assert text(9, "c") == "abcabcab"
    assert text(10, "c") == "abcabcabc"


def test_a_special_tokens_text_as_stop_string(tokenizers: dict[str, Any], detokenizers: dict[str, Detokenizer]) -> None:
    tokenizer = tokenizers["smollm2"]
    ids = [*_encode(tokenizer, "yes"), tokenizer.convert_tokens_to_ids("<|im_start|>"), *_encode(tokenizer, "no")]
    for skip, include, expected in (
        (True, False, "yes"),
        (True, True, "yes"),
        (False, False, "yes"),
        (False, True, "yes<|im_start|>"),
    ):
        stream = _stream(
            detokenizers["smollm2"], skip=skip, stop=("<|im_start|>", "s!"), include_stop_str_in_output=include
        )
        delta = stream.push(ids)
        assert (stream.text, delta.stopped, delta.num_tokens) == (expected, True, 2)


def test_forks_are_independent(name: str, tokenizers: dict[str, Any], detokenizers: dict[str, Detokenizer]) -> None:
    tokenizer = tokenizers[name]
    text = "the time" if name in ("metaspace", "wordpiece") else "the 😀"
    ids = _encode(tokenizer, text)
    stream = _stream(detokenizers[name], stop=("never",))
    stream.push(ids[:-1])
    other = stream.fork()
    third = other.fork()
    stream.push(ids[-1:])
    stream.finish()
    other.push(_encode(tokenizer, "dog"))
    other.finish()
    third.push(ids[-1:])
    third.finish()
    assert stream.text == third.text == text
    assert other.text != text
