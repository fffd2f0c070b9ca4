# python data/stdlib/prepare.py && python train.py config/quickstart_adamw.py
# Expected: see quickstart.py, which differs in the optimizer alone.
out_dir = "out/quickstart-adamw"
init_from = "auto"

n_layer = 3
n_head = 4
n_embd = 64
block_size = 64

dataset = "stdlib"
batch_size = 32
total_batch_size = 32

optimizer = "adamw"
learning_rate = 8e-3
beta1 = 0.8
beta2 = 0.95
eps = 1e-8
weight_decay = 0.1

max_iters = 1200
warmup_iters = 60

eval_interval = 300
checkpoint_interval = 600
sample_tokens = 300
