# glibc: keep memory between steps (saves about a tenth of the time)
export MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TOP_PAD_=500000000
nextscale train tokenizer --out runs/tokenizer --steps 24000 --batch-size 12 --lr 1.5e-3 --warmup 200 --threads 2 \
    --precision bfloat16 --validate-every 2000 --save-every 1000 \
    --loss.codebook 0.5 --loss.quantize-start 0.05 --loss.restart-until 0.7 --augmentation.hue 0 --augmentation.scale 0.12
torchrun --standalone --nproc-per-node 2 -m nextscale train generator --tokenizer runs/tokenizer --out runs/generator \
    --steps 11000 --batch-size 16 --lr 8e-4 --warmup 200 --ema 0.999 --threads 1 --precision bfloat16 --views 10 \
    --validate-every 1000 --save-every 500 \
    --augmentation.hue 0 --augmentation.scale 0.08 --augmentation.shift 0.04
python tools/ship.py runs/generator/system emoji-64 docs/emoji-64/commands.sh
nextscale curves runs/tokenizer runs/generator --out docs/emoji-64/curves.png
nextscale demo --out docs/images
