# python data/stdlib/prepare.py && python train.py config/quickstart_adamw.py
# Expected: validation loss 1.53-1.54 nats per byte in about a minute on two CPU cores.
# quickstart.py with AdamW at the best of the settings tried in results/controlled_gamma.md.
init_from = "auto"
n_layer = 3
n_head = 4
n_embd = 64
block_size = 64
dataset = "stdlib"
batch_size = 32
total_batch_size = 32
optimizer = "adamw"
learning_rate = 1.2e-2
beta2 = 0.99
max_iters = 1200
warmup_iters = 180
eval_interval = 300
checkpoint_interval = 600
sample_tokens = 300
