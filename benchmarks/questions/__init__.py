"""All questions about compiled programs, by name."""

from questions import layers as layers
from questions import steps as steps
from questions import training as training
from questions.base import QUESTIONS as QUESTIONS
from questions.base import Case as Case
from questions.base import Figures as Figures
