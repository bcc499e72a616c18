"""The soft prompt and its KV form. Training is in `ctp.prompt.train`: it evaluates, and `ctp.evaluate` imports this."""

from .kv import PromptCache as PromptCache
from .kv import generate as generate
from .kv import generate_ids as generate_ids
from .kv import prompt_cache as prompt_cache
from .kv import prompted_logits as prompted_logits
from .soft import SoftPrompt as SoftPrompt
from .soft import init_prompt as init_prompt
