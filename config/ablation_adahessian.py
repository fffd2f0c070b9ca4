# torchrun --nproc_per_node=8 train.py config/ablation_adahessian.py
# Fig. 7c: AdaHessian, with an estimate at every step: the paper saw it diverge with one every 2.
# Betas from the paper; the rate is AdamW's at this size. 30M model; compare with
# train_gpt2_30m_sophiag.py.
n_layer = 6
n_head = 6
n_embd = 384
batch_size = 30
optimizer = "adahessian"
learning_rate = 1.2e-3
