export OMP_NUM_THREADS=1 MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TOP_PAD_=500000000
nextscale train tokenizer --recipe flexvar --out runs/flexvar-tokenizer --steps 10000 --batch-size 12 --lr 1.5e-3 --warmup 200 --threads 1 \
    --precision bfloat16 --validate-every 2000 --save-every 1000 \
    --loss.quantize-start 0.05 --augmentation.hue 0 --augmentation.scale 0.12
nextscale train generator --recipe flexvar --tokenizer runs/flexvar-tokenizer --out runs/flexvar \
    --steps 7000 --batch-size 16 --lr 8e-4 --warmup 200 --ema 0.999 --threads 1 --precision bfloat16 --views 10 \
    --validate-every 1000 --save-every 500 \
    --augmentation.hue 0 --augmentation.scale 0.08 --augmentation.shift 0.04
python benchmarks/small_scale.py flexvar runs/flexvar/system --out docs/flexvar
