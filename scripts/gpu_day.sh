#!/usr/bin/env bash
# Everything that a GPU is borrowed for, in stages of less than nine minutes that need no network:
# scripts/gpu_day.sh STAGE...
#   1  facts, tests/gpu, self-test, an installation from the source tree
#   2  speed of B0 against torchvision and torch.compile
#   3  every launch of a step against the rate of a copy, and ncu on the three that lose most
#   4  the tuner, and B0's speed before and after
#   5  compute-sanitizer
#   dry  the commands of all stages at toy sizes on a machine without a GPU (benchmarks/without_gpu.py)
# Results go to $OUT (gpu_day by default), each written as it comes. A step that fails or takes too long does not stop
# the next, and the exit status says whether one did. Python is $PYTHON. TRITON_CACHE_DIR may name kernels that
# benchmarks/gpu_prepare.py has compiled before, without which compiling takes most of the time.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-gpu_day}")
LIMIT=530 # seconds of a stage
mkdir -p "$OUT"
export OUT PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}

python=("$PYTHON" -W ignore)
effnet=(-m effnet_kernels.tools.cli)
tests=(-m pytest -q --tb=short -p no:cacheprovider -p pytest_results)
# Kernels are compiled as tests meet them, in a process a core if there can be several.
parallel=()
"$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
ncu=(ncu --clock-control none --set full --page details)
sanitizer=(compute-sanitizer --error-exitcode 9 --print-limit 20)
install=(--target "$OUT.site")
# Options that only make a step small.
toy=() toy_network=() toy_tests=()
dtypes=(float16 bfloat16)
minutes=4
profiled=3
failed=()

begin() { # NAME: of a stage
    end=$((SECONDS + LIMIT))
    echo "=== stage $1, $(date -u +%FT%TZ)"
}

step() { # NAME LIMIT COMMAND...: runs it for as long as it and the stage may, and says how it ended
    local name=$1 limit=$2 started=$SECONDS status=0
    shift 2
    ((limit = limit < end - SECONDS ? limit : end - SECONDS))
    if ((limit < 10)); then
        echo "== $name: no time is left"
        failed+=("$name")
        return
    fi
    echo "== $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "$@" || status=$?
    echo "== $name: status $status after $((SECONDS - started)) s"
    ((status == 0)) || failed+=("$name")
}

facts() {
    nvidia-smi
    nproc
    gcc --version | head -1
    ncu --version | tail -1
    compute-sanitizer --version | head -1
    "$PYTHON" --version
    "$PYTHON" -m pip list
}

stage_1() {
    begin "1: tests"
    facts >"$OUT/facts.txt" 2>&1
    step "info" 40 "${python[@]}" "${effnet[@]}" info
    step "device" 150 "${python[@]}" "${tests[@]}" tests/gpu/test_device.py --results "$OUT/device.json" \
        ${toy_tests[@]+"${toy_tests[@]}"}
    step "tests/gpu" 240 "${python[@]}" "${tests[@]}" tests/gpu --results "$OUT/tests.json" \
        ${parallel[@]+"${parallel[@]}"} ${toy_tests[@]+"${toy_tests[@]}"}
    step "self-test" 150 "${python[@]}" "${effnet[@]}" selftest --json "$OUT/selftest.json" \
        ${toy_network[@]+"${toy_network[@]}"}
    # A copy, because the build writes into the tree.
    local copy
    copy=$(mktemp -d)
    tar -c --exclude=./.git --exclude=./.venv --exclude=./build --exclude=./gpu_day . | tar -x -C "$copy"
    step "installation" 150 env EFFNET_KERNELS_REQUIRE_NATIVE=1 "$PYTHON" -m pip install --quiet \
        --no-build-isolation --no-index --no-deps "${install[@]}" "$copy"
    rm -rf "$copy"
    [[ ! -d $OUT.site ]] || step "installed extension" 30 env -C / PYTHONPATH="$OUT.site" "$PYTHON" -c \
        'from effnet_kernels import _native; print(_native.__file__)'
}

stage_2() {
    begin "2: speed"
    local dtype
    for dtype in "${dtypes[@]}"; do
        step "speed in $dtype" $((LIMIT / 2)) "${python[@]}" benchmarks/gpu_speed.py --json "$OUT/speed_$dtype.json" \
            --seconds $((LIMIT / 2 - 40)) --cases "^efficientnet_b0 .* $dtype " \
            --contenders '^ours|^torchvision|^torch.compile default' ${toy[@]+"${toy[@]}"}
    done
}

stage_3() {
    begin "3: launches"
    local index kernel weakest
    weakest=$(mktemp)
    step "training" 140 "${python[@]}" benchmarks/gpu_kernels.py --json "$OUT/launches_training.json" --seconds 120 \
        ${toy[@]+"${toy[@]}"}
    step "inference" 100 "${python[@]}" benchmarks/gpu_kernels.py --json "$OUT/launches_inference.json" \
        --inference --seconds 80 ${toy[@]+"${toy[@]}"}
    step "inference of one image" 80 "${python[@]}" benchmarks/gpu_kernels.py --json "$OUT/launches_one_image.json" \
        --inference --batch 1 --seconds 60 ${toy[@]+"${toy[@]}"}
    # shellcheck disable=SC2016
    step "which lose most" 40 bash -o pipefail -c '"${@:2}" | tee "$1"' - "$weakest" \
        "${python[@]}" benchmarks/gpu_kernels.py --weakest "$OUT/launches_training.json" --number "$profiled"
    while read -r index kernel; do
        # The first launches are the compiler's.
        [[ ${#ncu[@]} -eq 0 ]] || profiler=("${ncu[@]}" --kernel-name "regex:^$kernel\$" --launch-skip 2
            --launch-count 1 --log-file "$OUT/ncu_$index.txt")
        step "ncu, launch $index of $kernel" 70 ${profiler[@]+"${profiler[@]}"} \
            "${python[@]}" benchmarks/gpu_kernels.py --only "$index" ${toy[@]+"${toy[@]}"} </dev/null
    done <"$weakest"
    rm "$weakest"
}

stage_4() {
    begin "4: tuner"
    local speed=("${python[@]}" benchmarks/gpu_speed.py --cases "^efficientnet_b0 .* ${dtypes[0]} batch (2$|256)")
    speed+=(--contenders '^ours(, frozen)?$' ${toy[@]+"${toy[@]}"})
    step "before" 90 "${speed[@]}" --json "$OUT/before.json"
    step "tuner" 330 "${python[@]}" "${effnet[@]}" tune --batch 256 --fields 1 --minutes "$minutes" \
        --output "$OUT/launch_table.json" --json "$OUT/tune.json" ${toy_network[@]+"${toy_network[@]}"}
    step "after" 90 env EFFNET_KERNELS_TABLE="$OUT/launch_table.json" "${speed[@]}" --json "$OUT/after.json"
}

stage_5() {
    begin "5: compute-sanitizer"
    local tool small=(tests/gpu/test_pointwise.py tests/gpu/test_depthwise.py tests/gpu/test_vectors.py)
    # Without the sanitizer, so that no kernel is compiled under it.
    step "compilation" 110 "${python[@]}" "${tests[@]}" "${small[@]}" ${parallel[@]+"${parallel[@]}"} \
        ${toy_tests[@]+"${toy_tests[@]}"}
    # Without torch's cache of memory each tensor has ends of its own.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck; do
        [[ ${#sanitizer[@]} -eq 0 ]] || checker=("${sanitizer[@]}" --tool "$tool" --log-file "$OUT/$tool.txt")
        step "$tool" 200 ${checker[@]+"${checker[@]}"} "${python[@]}" "${tests[@]}" "${small[@]}" \
            --results "$OUT/$tool.json" ${toy_tests[@]+"${toy_tests[@]}"}
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

stage_dry() {
    local stage
    python+=(benchmarks/without_gpu.py)
    ncu=() sanitizer=() parallel=() install=(--dry-run)
    toy=(--toy --rounds 1) toy_network=(--resolution 32 --batch 2) toy_tests=(--collect-only)
    dtypes=(bfloat16) minutes=0.1 profiled=1
    # What runs is small, and waiting threads would take the time of those that work.
    export OMP_NUM_THREADS=1
    # Launches on kernels that do nothing have no values to compare: tests/gpu runs under the simulator.
    for stage in 1 2 3 4 5; do
        "stage_$stage"
    done
}

(($# > 0)) || set -- dry
for stage in "$@"; do
    case $stage in
    [1-5] | dry) "stage_$stage" > >(tee "$OUT/stage_$stage.txt") 2>&1 ;;
    *)
        echo "expected stages out of 1 to 5 or dry, got $stage" >&2
        exit 2
        ;;
    esac
done
wait
if ((${#failed[@]} > 0)); then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "every step passed"
