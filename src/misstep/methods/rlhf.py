"""Reinforcement learning from preferences: a reward model, then a policy optimised for it.

The reward model learns from pairs of good answer and mistake; the policy answers the prompts
that mistakes were collected on and is optimised for the reward, with a KL penalty (RLOO, arXiv
2402.14740). As for DPO the budget counts pairs; what the policy samples comes on top of it.
"""

from misstep.methods.base import Materials, Method, Rows


class RLHF(Method):
    """Optimises the model for a reward that was learned from pairs."""

    name = "rlhf"
    needs_good_answers = True
    uses_mistakes = True
    on_pairs = True
    uses_ordinary = False
    trainer = "reinforce"

    def rows(self, materials: Materials) -> Rows:
        return materials.some(materials.pairs(), materials.budget, "pairs")
