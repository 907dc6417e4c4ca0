# Loads this folder with trust_remote_code=True, through the installed package: pip install rwkvx
from rwkvx.hf import ByteTokenizer, RwkvxConfig, RwkvxForCausalLM, WorldTokenizer  # noqa: F401
