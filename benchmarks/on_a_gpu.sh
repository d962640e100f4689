#!/usr/bin/env bash
# Tests and measurements that need a CUDA device; what each prints is kept in FOLDER/NAME.txt. Ends with 1 if one failed.
#
#     benchmarks/on_a_gpu.sh FOLDER              all of them
#     benchmarks/on_a_gpu.sh FOLDER tests moe    some
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:?"usage: benchmarks/on_a_gpu.sh FOLDER [NAME...]"}
wanted=" ${*:2} "
failed=""
mkdir -p "$folder"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

measure() {
    local name=$1
    shift
    [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
    echo "== $name: $*" | tee "$folder/$name.txt"
    timeout 580 "$@" 2>&1 | tee -a "$folder/$name.txt" | tail -n 25 || failed+=" $name"
}

step=(python benchmarks/train_step.py --device cuda --vocab 32768 --context 1024 --rounds 5 --steps 10 --warmup 10)
run=(python train.py tokenizer.vocab_size=32768 context_length=1024 max_steps=60 val_every=60)
run+=(checkpoint_every=60 callbacks.samples=null model/size=124m batch_tokens=32768 micro_batch_size=32)

measure tests python -m pytest -q -m gpu -n 0
measure step_124m "${step[@]}" --size 124m --windows 32
measure step_124m_compiled "${step[@]}" --size 124m --windows 32 --compile
measure step_350m "${step[@]}" --size 350m --windows 16
measure step_350m_compiled "${step[@]}" --size 350m --windows 16 --compile
measure attention python benchmarks/attention.py --device cuda --dtype bfloat16
measure kernels python benchmarks/attention_kernels.py --device cuda --times 512,2048,8192 --tokens 65536 --heads 16
measure moe python benchmarks/moe.py --device cuda --precisions bf16-mixed --tokens 16384 --d-model 2048 --width 1408
measure optimizers python benchmarks/optimizer_step.py --device cuda --size 124m
for stage in 1 2 3; do
    measure "zero$stage" "${run[@]}" trainer=deepspeed trainer.devices=1 "trainer.stage=$stage" optimizer=muon
done
measure moe_muon "${run[@]}" trainer=gpu model=moe model.ffn.num_experts=64 model.ffn.top_k=8 optimizer=muon
[[ -z $failed ]] || { echo "failed:$failed" >&2; exit 1; }
