# python data/shakespeare_char/prepare.py && python train.py config/shakespeare.py
# Expected: validation loss 1.572-1.586 nats per character in about three minutes on one CPU core,
# where nanoGPT's example, of the same model and steps, ends at 1.90-1.91 by the same evaluation
# (its README says 1.88); results/shakespeare.md has the other optimizers at their best.
init_from = "auto"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
dataset = "shakespeare_char"
batch_size = 12
total_batch_size = 12
optimizer = "metric_muon"
learning_rate = 5e-3
max_iters = 2000
warmup_iters = 100
dtype = "float32"
eval_interval = 500
sample_tokens = 300
