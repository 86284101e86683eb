# glibc: keep memory between steps (saves about a tenth of the time); each run on one thread, two beside each other
export MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TOP_PAD_=500000000 OMP_NUM_THREADS=1
# an autoencoder, with bits; stopped at step 24,000
nextscale train tokenizer --recipe infinity --out runs/bits --data emoji --steps 28000 --batch-size 12 --lr 1.5e-3 --warmup 200 \
    --threads 1 --precision bfloat16 --validate-every 2000 --save-every 1000 --system.sizes 1 2 3 5 8 8 \
    --loss.quantize-start 0.05 --loss.drop prefix --loss.drop-scales 0.1 --loss.drop-from 1 \
    --augmentation.hue 0 --augmentation.scale 0.12
nextscale save runs/bits/checkpoints/00024000 --to runs/autoencoder
# around it, with a third map at the full size and three of five images of OpenMoji: bits, and codes
nextscale train tokenizer --recipe infinity --autoencoder-from runs/autoencoder --out runs/bits7 \
    --data openmoji+openmoji+openmoji+openmoji+noto+twemoji+fluent+emojione --steps 10000 --batch-size 12 --lr 1e-3 --warmup 200 \
    --threads 1 --precision bfloat16 --validate-every 2000 --save-every 500 --system.sizes 1 2 3 5 8 8 8 \
    --loss.drop prefix --loss.drop-scales 0.1 --loss.drop-from 1 --augmentation.hue 0 --augmentation.scale 0.12
nextscale train tokenizer --autoencoder-from runs/autoencoder --out runs/tokenizer7 \
    --data openmoji+openmoji+openmoji+openmoji+noto+twemoji+fluent+emojione --steps 9000 --batch-size 12 --lr 1e-3 --warmup 200 \
    --threads 1 --precision bfloat16 --validate-every 2000 --save-every 500 --system.sizes 1 2 3 5 8 8 8 \
    --system.autoencoder.around 0 --system.pyramid.codebook-size 2048 --system.pyramid.limits 16 64 512 1024 2048 2048 2048 \
    --loss.codebook 0.5 --loss.restart-until 0.7 --augmentation.hue 0 --augmentation.scale 0.12
# the generator of codes; stopped at step 2,890, its averaged weights taken
torchrun --standalone --nproc-per-node 2 -m nextscale train generator --tokenizer docs/five-sets/codes --out runs/generator \
    --data openmoji+openmoji+openmoji+openmoji+noto+twemoji+fluent+emojione --views 4 --steps 3600 --batch-size 32 --lr 2.5e-3 \
    --warmup 200 --ema 0.999 --threads 1 --precision bfloat16 --compile --validate-every 1800 --save-every 250 \
    --transformer.dropout 0 --transformer.drop-path 0 --loss.progressive 0.7 --loss.progressive-from 3 \
    --loss.drop-parts label 0.1 style 0.1 --augmentation.hue 0 --augmentation.scale 0.08 --augmentation.shift 0.04
nextscale save runs/generator/checkpoints/00002890 --to runs/judged
nextscale tune runs/judged --data openmoji --guidance 2 3 4 --temperature 0.8 0.9 1 --passes 1 --out runs/tune --to runs/tuned
