# glibc: keep memory between steps (saves about a tenth of the time)
export MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TOP_PAD_=500000000 OMP_NUM_THREADS=1
nextscale train tokenizer --recipe infinity --out runs/bits --steps 14000 --batch-size 12 --lr 1.5e-3 --warmup 200 --threads 1 \
    --precision bfloat16 --validate-every 2000 --save-every 1000 --loss.quantize-start 0.05 \
    --loss.drop prefix --loss.drop-scales 0.1 --loss.drop-from 1 --augmentation.hue 0 --augmentation.scale 0.12
torchrun --standalone --nproc-per-node 2 -m nextscale train generator --recipe infinity --tokenizer runs/bits --out runs/text \
    --steps 7000 --batch-size 16 --lr 8e-4 --warmup 200 --ema 0.999 --threads 1 --precision bfloat16 --views 10 \
    --validate-every 1000 --save-every 500 \
    --augmentation.hue 0 --augmentation.scale 0.08 --augmentation.shift 0.04
python tools/ship.py runs/text/system emoji-64-text docs/emoji-64-text/commands.sh
nextscale curves runs/bits runs/text --out docs/emoji-64-text/curves.png
nextscale sample --prompt "a red apple" "a smiling cat" "flag of France" "woman with red hair" "a yellow heart" "blue car" "a tree" "two o'clock" \
    --out docs/emoji-64-text/prompts.png
nextscale sample --prompt "a red apple" "a smiling face" "woman with red hair" "a yellow heart" "blue car" "a tree" "flag" "couple with heart" \
    "green circle" "fish" --count 1 --columns 10 --seed 4 --out docs/images/prompts.png
