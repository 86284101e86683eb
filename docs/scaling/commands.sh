nextscale scaling --out runs/scaling --width 24 --steps 1000 --batch-size 32 --lr 1.5e-3 --threads 1 --precision bfloat16 \
    --validate-every 100 --save-every 250 --samples 512 \
    --augmentation.hue 0 --augmentation.scale 0.08 --augmentation.shift 0.04
