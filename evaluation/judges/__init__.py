"""The judges of emoji32: small networks that no method has met. `shipped.py` loads them, `recipe.py` trains them."""
