"""Answers to the exercises of lesson 3."""

from torch import Tensor


def softmax_backward(P: Tensor, dP: Tensor) -> Tensor:
    return P * (dP - (P * dP).sum(-1, keepdim=True))


def gradients_of_attention(Q: Tensor, K: Tensor, V: Tensor, dO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = Q.shape[-1] ** -0.5
    P = (scale * Q @ K.mT).softmax(-1)
    dV = P.mT @ dO
    dS = softmax_backward(P, dO @ V.mT)
    return scale * dS @ K, scale * dS.mT @ Q, dV


def softmax_backward_with_lse(P: Tensor, dP: Tensor, D: Tensor, dLSE: Tensor) -> Tensor:
    return P * (dP - D + dLSE)  # ∂LSE/∂S = P: dLSE joins D
