#!/usr/bin/env bash
# All stages of training in miniature, from nothing to a release: `make stages`, or bash configs/mini/stages/all.sh.
#
# The autoencoder and the text encoders are the shipped release's. Each stage goes on from the export of the one before,
# and its flow loss on held-out clips of 128 pixels is printed at the end. What is there already is not made again: the
# same command goes on after an interruption.
#
# Expected: half an hour of two cores with AVX2, nine minutes of it for latents. Held-out loss: t2i_64 1.116 (it has seen
# no clip), t2iv_64 0.662, t2iv_128 0.3437, sft_3 0.3441, sft_4 0.3447, their mean 0.3427. A run of the shipped release's
# size and length is configs/mini/mini_dit.yaml, with 0.096. What this one draws has the colours asked for, in patches: its
# shapes would come with ten times the steps.
set -euo pipefail
here=configs/mini/stages latents=latents/stages runs=runs/stages releases=releases/stages
kino() { python -m kinoflow.train "$@"; }
latents() { kino precompute $here/latents.yaml out=$latents/"$@"; }
stage() {  # NAME, then what train is told
  kino "${@:2}" run="$runs/$1" && kino export "$runs/$1" "$releases/$1"
}

latents 64
latents 128 clips=880 seed=1 buckets="[32x128x128@16 weight=10, 1x128x128@16 weight=1]"
latents sft clips=128 seed=2 buckets="[32x128x128@16]"
latents held_out clips=48 source=world:heldout buckets="[32x128x128@16]"

stage t2i_64 $here/t2i_64.yaml
stage t2iv_64 $here/t2iv_64.yaml init_from=$releases/t2i_64
stage t2iv_128 $here/t2iv_128.yaml init_from=$releases/t2iv_64
for seed in 3 4; do
  stage sft_$seed $here/sft_128.yaml init_from=$releases/t2iv_128 seed=$seed
done
kino average $releases/average $releases/sft_3 $releases/sft_4

for name in t2i_64 t2iv_64 t2iv_128 sft_3 sft_4 average; do
  echo "$name: $(kino validate $releases/$name $latents/held_out | head -1)"
done
