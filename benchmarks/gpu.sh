#!/usr/bin/env bash
# All rows that want a GPU, in one call of under ten minutes on one H100, without network:
#
#     bash benchmarks/gpu.sh          # on a GPU
#     bash benchmarks/gpu.sh --tiny   # the same rows at tiny size, on any machine: do they run?
#
# Each row is one benchmark, whose last line is JSON. They are gathered in benchmarks/results/<device>.json with the
# versions and the date; a row that failed or ran out of time stands there with its status and last words.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
OUT=${OUT:-benchmarks/results}
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
TIMES=$(mktemp -d)
trap 'rm -rf "$TIMES"' EXIT

row() { # name, seconds, command
  local name=$1 limit=$2 status
  shift 2
  echo "== $name"
  timeout "$limit" "$PYTHON" "$@" > "$TIMES/$name.out" 2> "$TIMES/$name.err"
  status=$?
  cat "$TIMES/$name.out"
  [ $status -eq 0 ] || { echo "failed with status $status"; tail -n 3 "$TIMES/$name.err"; }
  echo "$status $*" > "$TIMES/$name.status"
}

if [ "${1:-}" = --tiny ]; then
  row dream 900 benchmarks/dream.py --tiny --rounds 1
  row finetune 900 benchmarks/finetune.py --size tiny --batch 2 --rounds 1
  row policy 900 benchmarks/policy.py --sizes tiny --rounds 3
  row label 900 benchmarks/label.py --labeler none --clips 2 --rounds 1
else
  row dream 170 benchmarks/dream.py --size wan2.2-5b --rounds 1
  row dream_compiled 90 benchmarks/dream.py --size wan2.2-5b --rounds 1 --compile --alone
  row dream_long 70 benchmarks/dream.py --size wan2.2-5b-long --rounds 1 --alone
  row finetune 130 benchmarks/finetune.py --size wan2.2-5b --rounds 3
  row policy 70 benchmarks/policy.py --sizes base --rounds 30 --compile
  row label 50 benchmarks/label.py --labeler none --clips 8 --rounds 2
fi

"$PYTHON" - "$TIMES" "$OUT" "${1:-}" <<'PY'
import datetime, json, platform, re, sys
from pathlib import Path
import accelerate, diffusers, torch, transformers

times, out, tiny = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "--tiny"
cuda = torch.cuda.is_available()
device = torch.cuda.get_device_name(0) if cuda else f"CPU ({platform.machine()})"
rows, failed = {}, []
for status in sorted(times.glob("*.status")):
    code, _, command = status.read_text().strip().partition(" ")
    lines = (times / f"{status.stem}.out").read_text().strip().splitlines()
    row = json.loads(lines[-1]) if code == "0" and lines else {"status": int(code)}
    if code != "0":
        row["said"] = (times / f"{status.stem}.err").read_text().strip().splitlines()[-3:]
        failed.append(status.stem)
    rows[status.stem] = {"command": f"python {command}", **row}
result = {
    "date": datetime.date.today().isoformat(), "device": device, "tiny": tiny,
    "versions": {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__,
                 "transformers": transformers.__version__, "accelerate": accelerate.__version__},
    "cuda": torch.version.cuda, "rows": rows,
}
out.mkdir(parents=True, exist_ok=True)
path = out / (re.sub(r"\W+", "_", device.lower()).strip("_") + ("_tiny" if tiny else "") + ".json")
path.write_text(json.dumps(result, indent=1) + "\n")
print(f"{len(rows)} rows, {len(failed)} failed{': ' + ', '.join(failed) if failed else ''} -> {path}")
sys.exit(bool(failed))
PY
