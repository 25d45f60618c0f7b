"""The processes of ``ckpt serve``: replicas, the front, and the one that starts them."""
