#!/bin/sh
# Checks and measures the network of this bundle on this machine.
set -u
usage='usage: ./run.sh [options]

Checks the answers of the network against the recorded ones, measures it, and writes results/NAME.json, .md and .csv.

  --device LIST     cpu, cuda or cpu,cuda (what works here)
  --batch LIST      rows of a run (1,8,64)
  --threads LIST    on the CPU (1 and all)
  --precision LIST  float32, float16, bfloat16: what tensor cores multiply on CUDA (float32)
  --seconds S       of each repeat
  --no-power        leave out the energy
  --no-dense        leave out the comparison with every weight dense
  --trtexec         put TensorRT beside it, on dense.onnx
  --build           build source/ even where bin/ has a program for this machine
  --results NAME    of the files (machine and time)
  --help

PYKD_EMULATOR, such as "qemu-aarch64-static -L /usr/aarch64-linux-gnu", runs the program of bin/aarch64 elsewhere: its
answers count then, its times do not. PYKD_CUDA=off builds without CUDA.
Exit codes: 0 success, 1 answers differ or a part failed, 2 usage.'

say() { echo "run.sh: $*" >&2; }
wrong() {
  say "$*: see ./run.sh --help"
  exit 2
}

devices='' batches=1,8,64 threads='' precision='' seconds='' power=--power dense=--dense trtexec=no build=no name=''
while [ $# -gt 0 ]; do
  case $1 in
    --device | --batch | --threads | --precision | --seconds | --results)
      [ $# -gt 1 ] || wrong "$1 needs a value"
      case $2 in '' | -* | *[!A-Za-z0-9._,-]*) wrong "$1 cannot be '$2'" ;; esac
      case $1 in
        --device) devices=$2 ;;
        --batch) batches=$2 ;;
        --threads) threads=$2 ;;
        --precision) precision=$2 ;;
        --seconds) seconds=$2 ;;
        --results) name=$2 ;;
      esac
      shift
      ;;
    --power) power=--power ;;
    --no-power) power='' ;;
    --no-dense) dense='' ;;
    --trtexec) trtexec=yes ;;
    --build) build=yes ;;
    -h | --help)
      echo "$usage"
      exit 0
      ;;
    *) wrong "$1 is not known" ;;
  esac
  shift
done
case $devices in '' | cpu | cuda | cpu,cuda | cuda,cpu) ;; *) wrong "--device cannot be '$devices'" ;; esac
for list in "$batches" ${threads:+"$threads"}; do
  case ,$list, in *[!0-9,]* | *,,*) wrong "--batch or --threads cannot be '$list'" ;; esac
done
case $name in .* | *,*) wrong "--results cannot be '$name'" ;; esac # a comma parts the logs of trtexec

unset CDPATH # else cd may go elsewhere
cd -- "$(dirname -- "$0")" || exit 1
for file in model.pykd.safetensors inputs.npy answers.npy; do
  [ -f $file ] || {
    say "$PWD holds no $file: copy the bundle again, all of it"
    exit 1
  }
done
emulator=${PYKD_EMULATOR:-}
machine=$(uname -m)
[ -z "$emulator" ] || machine=aarch64
cores=$({ nproc || getconf _NPROCESSORS_ONLN || echo 1; } 2>/dev/null)
name=${name:-$(uname -n | tr -c 'A-Za-z0-9\n' -)-$(date +%Y%m%d-%H%M%S)}
result=results/$name
if [ -e "$result.json" ] || [ -e "$result.md" ]; then
  say "$result.json or .md is there already: give another --results NAME"
  exit 2
fi
mkdir -p results && [ -w results ] || {
  say "nothing can be written into $PWD/results: copy the bundle to a folder of your own"
  exit 1
}
PATH=$PATH:/usr/local/cuda/bin
failed=0

# ---- a program that runs here --------------------------------------------------------------------------------------

run() { $emulator "$program" "$@"; }
starts() { [ -f "$1" ] && $emulator "$1" --version >/dev/null 2>&1; }
# Whether the program answers on CUDA; where not, `reason` says why.
cuda_works() { reason=$(run model.pykd.safetensors --input inputs.npy --device cuda --output /dev/null 2>&1 >/dev/null); }

build() {
  for tool in cmake "${CXX:-c++}"; do
    command -v "$tool" >/dev/null || {
      say "$tool is missing, and source/ cannot be built: run sudo apt-get install cmake g++"
      return 1
    }
  done
  say "building source/ in build/ (some minutes) ..."
  [ "$(sed -n 's/^CMAKE_HOME_DIRECTORY:INTERNAL=//p' build/CMakeCache.txt 2>/dev/null)" = "$PWD/source" ] || rm -rf build
  { cmake -S source -B build -DPYKD_RUNTIME=ON -DPYKD_CUDA="${PYKD_CUDA:-auto}" &&
    cmake --build build --target pykd-run -j "$cores"; } >build.log 2>&1 || {
    tail -n 20 build.log >&2
    say "the build failed: build.log holds all of it"
    return 1
  }
  sed -n 's/^-- pykd: //p' build.log >&2
}

program=bin/$machine/pykd-run
if [ $build = no ] && starts "$program"; then
  if ! cuda_works && [ -z "$emulator" ] && [ "${PYKD_CUDA:-auto}" != off ] && command -v nvcc >/dev/null; then
    say "$program finds no CUDA here ($reason), and nvcc is there"
    build && program=build/pykd-run
  fi
elif [ -n "$emulator" ]; then
  say "$emulator does not run $program: make the bundle with --binaries"
  exit 1
else
  build || exit 1
  program=build/pykd-run
fi
say "$program, $(run --version)"

# ---- answers -------------------------------------------------------------------------------------------------------

if cuda_works; then
  devices=${devices:-cpu,cuda}
else
  say "no CUDA: $reason"
  devices=${devices:-cpu}
fi
good=''
for device in $(echo "$devices" | tr , ' '); do
  echo "$device: checking the answers"
  if run model.pykd.safetensors --input inputs.npy --check answers.npy --device "$device"; then
    good=$good${good:+,}$device
  else
    say "$device does not give the recorded answers, it is not measured"
    failed=1
  fi
done
[ -n "$good" ] || exit 1

# ---- TensorRT, the alternative ---------------------------------------------------------------------------------------

# Sets `logs` to the logs of trtexec, a list.
measure_trtexec() {
  found=$(command -v trtexec || command -v /usr/src/tensorrt/bin/trtexec) || {
    say "no trtexec on the PATH or in /usr/src/tensorrt/bin: TensorRT is left out"
    return 1
  }
  [ -f dense.onnx ] || {
    say "dense.onnx is missing: make the bundle with --onnx float16; TensorRT is left out"
    return 1
  }
  type=float32 flags=''
  ! grep -q input_float16 dense.onnx || type=float16
  help=$("$found" --help 2>&1)
  case $help in
    *--stronglyTyped*) flags=--stronglyTyped ;;
    *--fp16*) [ $type = float32 ] || flags=--fp16 ;; # TensorRT 8
  esac
  row=$(head -c 128 inputs.npy | tr -cd '[:print:]' | sed "s/.*'shape': (\([^)]*\)).*/\1/; s/^[0-9]*, *//; s/,\$//; s/, */x/g")
  for batch in $(echo "$batches" | tr , ' '); do
    log=$result-trtexec-$type-$batch.log
    echo "TensorRT: batch $batch"
    # shellcheck disable=SC2086
    if "$found" --onnx=dense.onnx --shapes=input:"${batch}x$row" $flags >"$log" 2>&1; then
      logs=$logs${logs:+,}$log
    else
      say "trtexec failed for batch $batch: $log says why"
      failed=1
    fi
  done
}
logs=''
[ $trtexec = no ] || measure_trtexec || failed=1

# ---- the measurement -------------------------------------------------------------------------------------------------

[ "$cores" = 1 ] || threads=${threads:-1,$cores}
echo "measuring on $good, batch $batches ..."
# shellcheck disable=SC2086
if run model.pykd.safetensors --bench --input inputs.npy --check answers.npy --device "$good" --batch "$batches" \
  --threads "${threads:-1}" ${precision:+--precision $precision} ${seconds:+--seconds $seconds} $power $dense \
  ${logs:+--trtexec $logs} --samples "$result.csv" --json "$result.json" >"$result.part"; then
  cat "$result.part"
  { echo '```' && cat "$result.part" && echo '```'; } >"$result.md"
  rm "$result.part"
  say "$PWD/$result.json holds the record, .md this table"
else
  cat "$result.part"
  rm -f "$result.part"
  say "the measurement failed"
  failed=1
fi
exit $failed
