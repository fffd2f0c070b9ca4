# torchrun --nproc_per_node=8 train.py config/ablation_normalize.py
# Fig. 7c: momentum normalised over all parameters (Normalize). 30M model; compare with
# train_gpt2_30m_sophiag.py.
n_layer = 6
n_head = 6
n_embd = 384
batch_size = 30
optimizer = "normalize"
learning_rate = 4e-4
