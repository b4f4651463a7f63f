"""Who writes tokens: the student, or a teacher by its name."""

Source = str
STUDENT = "student"
TEACHER = "teacher"
"""The name of the only teacher, if nobody gave it one."""
