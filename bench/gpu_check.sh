#!/usr/bin/env bash
# Everything that only a GPU can show, in one call of less than ten minutes: `bench/gpu_check.sh [DIRECTORY]`, or `make gpu`.
#
# Each part has its own time limit, in seconds, and its own log in DIRECTORY (build/gpu); what a part has printed and
# recorded before it was cut short stays, and the parts after it run. Records of bench/results are copied there too. Where
# there is no GPU the tests are skipped with their reasons and the benches refuse. Exit code 1: something failed.
#
# PYTHON names the interpreter, .venv's or python3 if it is not given; torch, triton and transformers must be there.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:-build/gpu}"
out=$(realpath "${1:-build/gpu}")
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD/proto:$PWD/kvstore:$PWD/client:$PWD/model_patch${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE
failed=0

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  echo "== $name, at most $limit s: $*"
  timeout -k 20 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  [ "$code" = 0 ] || failed=1
  echo "$name: exit code $code$([ "$code" = 124 ] && echo ", cut short"), $((SECONDS - start)) s" | tee -a "$out/summary"
  cp bench/results/*.jsonl "$out"
}

: >"$out/summary"
# Most of a GPU test is compilation: files beside each other take half the time.
tests=(-m pytest -n "${TEST_JOBS:-8}" -ra -p no:cacheprovider -p no:benchmark)
part tests "${TESTS_S:-120}" "$python" "${tests[@]}" -m gpu tests
part decode "${DECODE_S:-190}" "$python" bench/decode_gpu.py --record --steps 60 --json "$out/decode.json"
part prefill "${PREFILL_S:-50}" "$python" bench/prefill_gpu.py --record
part kernels "${KERNELS_S:-80}" "$python" "${tests[@]}" tests/client/test_kernels.py tests/client/test_decode_step.py
part clients "${CLIENTS_S:-50}" "$python" bench/clients.py
echo "== in $out:"
cat "$out/summary"
exit $failed
