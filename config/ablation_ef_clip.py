# torchrun --nproc_per_node=8 train.py config/ablation_ef_clip.py
# Fig. 7b: the empirical Fisher in place of Gauss-Newton-Bartlett (E-F+clip). 30M model; compare
# with train_gpt2_30m_sophiag.py.
n_layer = 6
n_head = 6
n_embd = 384
batch_size = 30
optimizer = "ef_clip"
learning_rate = 1e-3
