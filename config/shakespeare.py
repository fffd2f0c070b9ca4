# python data/shakespeare_char/prepare.py && python train.py config/shakespeare.py
# Expected: validation loss 1.57-1.59 nats per character in two to three minutes on a CPU, where
# nanoGPT's example, of the same model and steps, ends at 1.90-1.91 by the same evaluation (its
# README says 1.88); results/shakespeare.md has the other optimizers at their best.
init_from = "auto"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
dataset = "shakespeare_char"
batch_size = 12
total_batch_size = 12
optimizer = "metric_muon"
learning_rate = 1e-2
muon_momentum = 0.9
max_iters = 2000
warmup_iters = 100
dtype = "float32"
eval_interval = 500
sample_tokens = 300
