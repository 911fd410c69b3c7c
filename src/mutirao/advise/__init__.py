"""How few bits a model bears: measured on it, predicted with an interval, and decided."""
