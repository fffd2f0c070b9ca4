# torchrun --nproc_per_node=8 train.py config/ablation_clip.py
# Fig. 7c: the clip without curvature (Clip), which is sign momentum. 30M model; compare with
# train_gpt2_30m_sophiag.py.
n_layer = 6
n_head = 6
n_embd = 384
batch_size = 30
optimizer = "clip"
learning_rate = 4e-4
