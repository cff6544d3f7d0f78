"""The language-model engine: token sequences in, token sequences out, on one device.

OpenMP reads its environment when torch is first imported, so the default is set here, before any
module of the engine imports it.
"""

import os

# How long idle threads spin before they sleep. GOMP's own default holds a core for milliseconds that a
# server beside the engine needs to send tokens; much less, and every operation pays for a wake-up.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")
