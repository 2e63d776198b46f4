"""One engine a file, each behind the protocol of `cluster/engine.py`; `cluster/registry.py` lists them."""
