"""python -m hetero_attn: the hetero-attn command from a bare checkout, without installing anything."""

import sys

from hetero_attn.cli import main

if __name__ == "__main__":              # ranks that are spawned import this file again
    sys.exit(main())
