"""The one room that speaks both messages and tokens: chat templates, the bridge and its proof, tool-call formats.

Must never know an environment or an engine. Transformers is imported here (its template rendering only, which brings
no torch).
"""

from agentgym.render.chat_template import ChatTemplateRenderer, load_renderer
from agentgym.render.protocol import Renderer

__all__ = ["ChatTemplateRenderer", "Renderer", "load_renderer"]
