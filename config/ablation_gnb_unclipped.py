# torchrun --nproc_per_node=8 train.py config/ablation_gnb_unclipped.py
# Fig. 7c: no clip (GNB), with an estimate every 2 steps as the paper needed for stability. 30M
# model; compare with train_gpt2_30m_sophiag.py.
n_layer = 6
n_head = 6
n_embd = 384
batch_size = 30
optimizer = "gnb_unclipped"
learning_rate = 1e-3
