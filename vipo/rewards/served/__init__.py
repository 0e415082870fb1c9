"""What runs where vipo need not be installed: the server of a reward, and rewards of others' packages.

Files of this folder import nothing of vipo, are Python 3.8, and may be copied elsewhere as they are.
"""
