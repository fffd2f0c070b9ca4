# python data/stdlib/prepare.py && python train.py config/quickstart.py
# Expected: see quickstart_adamw.py for the baseline.
out_dir = "out/quickstart"
init_from = "auto"

n_layer = 3
n_head = 4
n_embd = 64
block_size = 64

dataset = "stdlib"
batch_size = 32
total_batch_size = 32

optimizer = "sophiag"
learning_rate = 6e-3
beta1 = 0.8
gamma = 2.0
hessian_batch_size = 32
hessian_chunks = 8

max_iters = 1200
warmup_iters = 60

eval_interval = 300
checkpoint_interval = 600
sample_tokens = 300
