#!/usr/bin/env bash
# Runs the GPU tests, the sanitizer and the benchmarks on a machine with a card and writes JSON and logs to $OUT.
#
#   OUT=results tools/gpu_session.sh smoke tests sanitizer bench host
#
# Stages run in the order given; one that fails or runs out of time does not stop the next. The last lines are a summary; the status is 0
# when every stage's was.
#   smoke      versions, one kernel per head dim and feature against float32             (default limit 120 s)
#   tests      pytest tests/gpu, demo, examples; summary and rows to $OUT/gpu_tests.json* (              420 s)
#   sanitizer  compute-sanitizer's four tools on small shapes, to $OUT/sanitizer.json    (              300 s)
#   bench      forward benchmark, record and picture                                     (              300 s)
#   backward   backward benchmark, record and picture, memory of training steps          (              300 s)
#   decode     KV cache benchmark, record and picture                                    (              300 s)
#   host       microseconds per call, start-up, memory growth                            (              200 s)
#   actor      round trip, pipeline, throughput and fusing of the actor                  (              200 s)
#   tune       search of tiles for cells of each head dim, as a table of shipped tiles   (              200 s)
#   layer      a compiled training step of a Llama-shaped layer, ours and torch's, record   (              240 s)
#   train      examples/train_gpt.py in four forms, their JSON and a picture                (              240 s)
#   devices    the tests that need two GPUs, and Ray for the pool, to $OUT/two_gpus.json (              240 s)
#   ddp        DDP and FSDP2 over NCCL on two GPUs: two steps are those of one GPU         (              240 s)
#
# Environment: LIMIT_SMOKE, LIMIT_TESTS, ... in seconds; PYTEST_ARGS, SANITIZER_ARGS, BENCH_ARGS,
# BACKWARD_ARGS, DECODE_ARGS, HOST_ARGS, ACTOR_ARGS, LAYER_ARGS, TUNE_ARGS (--backward searches the tiles
# of gradients); TRAIN_ARGS, as "--steps 300";
# ATOMR_FLASHATTN_COMMIT names the code that is measured where there is no .git; PYTHON the
# interpreter, else that of .venv where there is one; JOBS the test processes.
set -u
cd "$(dirname "$0")/.."
[[ -x .venv/bin/python ]] && PYTHON=${PYTHON:-.venv/bin/python}
export OUT=${OUT:-out} PYTHON=${PYTHON:-python3} JOBS=${JOBS:-12}
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export ATOMR_FLASHATTN_CACHE_DIR=${ATOMR_FLASHATTN_CACHE_DIR:-/tmp/atomr-flashattn-cache}
export ATOMR_FLASHATTN_TEST_RECORD=${ATOMR_FLASHATTN_TEST_RECORD:-$OUT/gpu_tests.json}
mkdir -p "$OUT"
summary=()
failed=0

stage() { # name, default limit in seconds, command...
  local name=$1 limit_name="LIMIT_${1^^}" began=$SECONDS status
  local limit=${!limit_name:-$2}
  shift 2
  echo "=== $name (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$OUT/session.log"
  status=${PIPESTATUS[0]}
  ((status == 0)) || failed=1
  summary+=("$name: exit $status, $((SECONDS - began)) s")
}

run_tests() {
  # NumPy's threads would fight over the cores: the processes are the parallelism. Warnings of this machine's packages are no failures.
  # shellcheck disable=SC2086
  OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 "$PYTHON" -m pytest tests/gpu tests/cli/test_demo.py tests/kv_cache/test_example.py tests/operators -m gpu --hypothesis-profile=explore -q -n "$JOBS" --dist worksteal -p no:cacheprovider \
    -p no:benchmark --timeout 180 --maxfail 100 --tb short --show-capture no -r fE -W default --disable-warnings ${PYTEST_ARGS:-}
}

run_sanitizer() {
  # shellcheck disable=SC2086
  OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 "$PYTHON" tools/sanitizer.py --out "$OUT" ${SANITIZER_ARGS:-}
}

run_tune() { # winners go to a cache of their own: the other stages measure the tiles that are shipped
  local head_dim status=0
  export ATOMR_FLASHATTN_CACHE_DIR=$ATOMR_FLASHATTN_CACHE_DIR-tune
  for head_dim in 128 256 64; do
    # shellcheck disable=SC2086
    "$PYTHON" -m atomr_accel_flashattn tune --cells "grid_d${head_dim}_*causal_2k,grid_d${head_dim}_*causal_8k,grid_d${head_dim}_*full_4k" \
      --table --budget 45 --rounds 3 --out "$OUT" ${TUNE_ARGS:-} || status=1
  done
  return $status
}

run_devices() {
  ATOMR_FLASHATTN_TEST_RECORD=$OUT/two_gpus.json "$PYTHON" -m pytest tests/gpu/test_actor.py tests/gpu/test_devices.py -m gpu --hypothesis-profile=explore -q \
    -p no:cacheprovider -p no:benchmark --timeout 120 -r fEs -W default --disable-warnings
}

run_ddp() { # without NVLink multicast, which not every machine that lends two GPUs of a host allows
  NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} "$PYTHON" -m pytest tests/operators/test_distributed.py -m gpu --hypothesis-profile=explore -q \
    -p no:cacheprovider -p no:benchmark --timeout 120 -r fEs -W default --disable-warnings
}

run_train() { # the compiled form last: Inductor takes most of its time
  local form status=0
  local -A forms=([dense]="--window -1" [window]="--window 255" [packed]="--packed" [compile]="--window -1 --compile")
  for form in dense window packed compile; do
    echo "--- $form"
    # shellcheck disable=SC2086
    "$PYTHON" examples/train_gpt.py ${forms[$form]} --out "$OUT/train_gpt_$form.json" ${TRAIN_ARGS:-} || status=1
  done
  if "$PYTHON" -c "import matplotlib"; then
    "$PYTHON" examples/train_gpt.py --draw "$OUT"/train_gpt_{dense,window,packed,compile}.json --out "$OUT/train_gpt.png" || status=1
  fi
  return $status
}
export -f run_tests run_sanitizer run_tune run_devices run_ddp run_train

[[ $# -gt 0 ]] || set -- smoke
for name in "$@"; do
  case $name in
    smoke) stage smoke 120 "$PYTHON" tools/gpu_smoke.py --out "$OUT/smoke.json" ;;
    tests) stage tests 420 bash -c run_tests ;;
    sanitizer) stage sanitizer 300 bash -c run_sanitizer ;;
    # shellcheck disable=SC2086
    bench) stage bench 300 "$PYTHON" tools/gpu_bench.py forward --out "$OUT" --budget 240 ${BENCH_ARGS:-} ;;
    # shellcheck disable=SC2086
    backward) stage backward 300 "$PYTHON" tools/gpu_bench.py backward --out "$OUT" --budget 240 ${BACKWARD_ARGS:-} ;;
    # shellcheck disable=SC2086
    decode) stage decode 300 "$PYTHON" tools/gpu_bench.py decode --out "$OUT" --budget 240 ${DECODE_ARGS:-} ;;
    # shellcheck disable=SC2086
    host) stage host 200 "$PYTHON" tools/gpu_bench.py host --out "$OUT" ${HOST_ARGS:-} ;;
    # shellcheck disable=SC2086
    actor) stage actor 200 "$PYTHON" -m atomr_accel_flashattn.bench.actor --out "$OUT" ${ACTOR_ARGS:-} ;;
    tune) stage tune 200 bash -c run_tune ;;
    # shellcheck disable=SC2086
    layer) stage layer 240 "$PYTHON" tools/gpu_bench.py layer --out "$OUT" --rounds 9 ${LAYER_ARGS:-} ;;
    train) stage train 240 bash -c run_train ;;
    devices) stage devices 240 bash -c run_devices ;;
    ddp) stage ddp 240 bash -c run_ddp ;;
    *)
      echo "no stage '$name': there are smoke, tests, sanitizer, bench, backward, decode, host, actor, tune, layer, train, devices, ddp" >&2
      exit 2
      ;;
  esac
done
printf '%s\n' "=== summary" "${summary[@]}"
exit "$failed"
