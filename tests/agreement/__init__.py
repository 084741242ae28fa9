"""Our operators side by side with other people's, on the CPU: values and gradients of the same numbers.

    pip install -e '.[dev,peers]'
    pip install --no-deps recurrentgemma 'typeguard<3' sentencepiece
    pip install ejkernel
    pip download --no-deps --no-binary :all: --no-build-isolation mamba-ssm
    tar -xf mamba_ssm-*.tar.gz && export PYTHONPATH="$PWD/$(echo mamba_ssm-*/)"
    python -m pytest tests/agreement

(recurrentgemma asks for older versions of absl-py and numpy than we do, and works with ours.)

    side_by_side            runs ours and theirs, and compares outputs, final states and gradients
    test_fla                flash-linear-attention: its naive references
    test_transformers       Mamba-2, MiniMax, Qwen3-Next, RecurrentGemma and xLSTM of transformers
    test_mlstm_kernels      the native forms of the authors of xLSTM
    test_recurrentgemma     the scan of the authors of Griffin
    test_titans_pytorch     the memory of titans-pytorch, where its function meets ours
    test_mamba_ssm          the listing of the paper on Mamba-2
    test_ejkernel           its programs for XLA
    test_torch              attention and convolution of torch

Where a library is not installed its file is skipped, with that reason. Functions that the benchmark names
(seqmodels/tools/benchmark/peers.py) are compared on its inputs, in its words; the rest have tests of their own, mainly
for states. Most peers compute in float32 whatever they are given, so all comparisons are in float32.

Known to be wrong or about something else, and so not here: fla's titans/naive.py (order of operations in the gradient
of its layer norm), the chunked form of its hgrn/naive.py (cuts the sequence by the number of chunks in place of their
size), its lightning_attn (other slopes than the authors'), its layers/mamba2.py without kernels (tiles B and C over
the heads, in place of repeating them) and layers/rwkv6.py; MiniMax of transformers with rotary positions (rotates
whole heads where the authors rotate 64 channels). The JAX forms of mlstm_kernels import a library of GPU kernels. Of
its native_custbw, whose backward pass takes the normaliser as a constant, values alone are compared, and so of two
chunked forms of fla, which overwrite what their gradients need.
"""
