# torchrun --nproc_per_node=8 train.py config/ablation_k1.py
# Fig. 7a: an estimate at every step. 30M model; compare with train_gpt2_30m_sophiag.py.
n_layer = 6
n_head = 6
n_embd = 384
batch_size = 30
learning_rate = 1e-3
hessian_interval = 1
