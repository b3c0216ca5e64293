#!/usr/bin/env bash
# Run the tests and the first 100 steps of the quick start with several versions of Python and torch.
#
#     scripts/versions.sh DIR python3.10:2.6.0:0.21.0 python3.12:2.9.1:0.24.1 python3.13::
#
# DIR gets one environment for each PYTHON:TORCH:TORCHVISION, about 6 GB each, and is used again if it
# is there. Without numbers pip takes the newest. The last lines say what passed.
set -uo pipefail
if [ $# -lt 2 ]; then sed -n '2,8s/^# \?//p' "$0"; exit 2; fi
dir=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
shift
results=()
for combination in "$@"; do
    IFS=: read -r python torch torchvision <<< "$combination"
    env="$dir/$(basename "$python")-${torch:-newest}"
    if [ ! -x "$env/bin/pytest" ]; then
        "$python" -m venv "$env" && "$env/bin/pip" install --quiet -r requirements.txt matplotlib \
            "torch${torch:+==$torch}" "torchvision${torchvision:+==$torchvision}" || exit 1
    fi
    versions=$("$env/bin/python" -c 'import platform, torch, torchvision as tv; print(
        "Python", platform.python_version(), "torch", torch.__version__, "torchvision", tv.__version__)')
    tests=$("$env/bin/python" -m pytest -q 2>&1 | tee "$env/tests.log" | tail -n 1)
    rm -rf "$env/out"
    "$env/bin/python" train.py --data_root "$dir/toy" --out_dir "$env/out" --max_steps 100 > "$env/train.log" 2>&1
    steps=$(grep "step 100/" "$env/train.log" || tail -n 1 "$env/train.log")
    results+=("$versions: $tests; ${steps%%  lr*}")
done
printf '%s\n' "${results[@]}"
