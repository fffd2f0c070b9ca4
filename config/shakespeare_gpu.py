# python data/shakespeare_char/prepare.py && python train.py config/shakespeare_gpu.py
# nanoGPT's example for a GPU, with its AdamW: its README says 1.4697 nats per character, the best
# of the evaluations on the way (it overfits from then on). Not measured here: no GPU was at hand.
init_from = "auto"
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2
activation = "gelu"
dataset = "shakespeare_char"
sampling = "random"
batch_size = 64
total_batch_size = 64
optimizer = "adamw"
learning_rate = 1e-3
beta2 = 0.99
max_iters = 5000
warmup_iters = 100
min_lr_ratio = 0.1
eval_interval = 250
eval_windows = 500
sample_tokens = 300
