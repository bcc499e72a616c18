"""How good a model is: perplexity and tasks, with and without a prompt."""

from .perplexity import PerplexityResult as PerplexityResult
from .perplexity import perplexity as perplexity
from .tasks import evaluate_tasks as evaluate_tasks
from .transfer import transfer as transfer
