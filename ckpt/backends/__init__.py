"""What a store is: six operations of which one is atomic; folders, fsspec URLs, encryption, and
several stores as one."""
