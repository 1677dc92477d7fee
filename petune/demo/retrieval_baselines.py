"""What could find a docstring without an adapter: the words alone, and a linear map of the frozen embeddings."""

from collections.abc import Sequence

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn

from petune.demo.docstrings import DocPair
from petune.demo.metrics import Floats
from petune.tasks.text_embedding import contrastive_loss

# A full-batch step and few of them suit the map best among six settings tried on held-out data of two seeds.
LINEAR_STEPS, LINEAR_LEARNING_RATE = 10, 1e-3


def tf_idf(train: Sequence[DocPair], held_out: Sequence[DocPair]) -> tuple[Floats, Floats]:
    """TF-IDF vectors of the held-out queries and docstrings, with the weights of the training texts."""
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    vectorizer.fit([text for pair in train for text in (pair.query, pair.docstring)])
    queries = vectorizer.transform([pair.query for pair in held_out])
    documents = vectorizer.transform([pair.docstring for pair in held_out])
    return queries.toarray(), documents.toarray()


def fit_linear_map(queries: Tensor, documents: Tensor, *, scale: float) -> nn.Linear:
    """A map of the frozen embeddings that starts as the identity, trained on all pairs at once.

    Args:
        queries: of the training pairs, [pairs, hidden_size].
        documents: as queries.
        scale: of the similarities in the contrastive loss.
    """
    size = queries.shape[1]
    mapping = nn.Linear(size, size, bias=False)
    nn.init.eye_(mapping.weight)
    optimizer = torch.optim.AdamW(mapping.parameters(), lr=LINEAR_LEARNING_RATE)
    for _ in range(LINEAR_STEPS):
        optimizer.zero_grad()
        mapped = [nn.functional.normalize(mapping(some), dim=-1) for some in (queries, documents)]
        contrastive_loss(mapped[0], mapped[1], scale).backward()
        optimizer.step()
    return mapping
