"""``spikelm bench``: how fast the kernels, decoding and training are, beside this machine's limits and peers.

Every figure is taken in one run with its limit (:mod:`spikelm.bench.limits`) and with its peers, which are
installed in environments of their own and run as processes (:mod:`spikelm.bench.peers`).
"""
