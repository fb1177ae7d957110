//! Numbers that an engine hands over in lists.
//!
//! A prompt has tens of thousands of tokens, and the engine waits while they are read. So the numbers of a list are read
//! where they are, one after the other, without packing them in Python and without a reference to each.

use std::ffi::c_ulong;
use std::ops::Range;

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyList;

/// Tokens. `None`: something among them stands for no token, or there are none to be told.
pub(crate) struct Tokens(pub Option<Vec<u32>>);

impl<'a, 'py> FromPyObject<'a, 'py> for Tokens {
    type Error = PyErr;

    fn extract(list: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        // Numbers of other kinds, such as numpy's, and other sequences take longer.
        Ok(Self(read(list).or_else(|| list.extract().ok())))
    }
}

/// Numbers of pages; -1 where there is none.
pub(crate) struct Pages(pub Vec<i32>);

impl<'a, 'py> FromPyObject<'a, 'py> for Pages {
    type Error = PyErr;

    fn extract(list: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        read(list).map_or_else(|| list.extract(), Ok).map(Self)
    }
}

/// Tokens of a list behind those that it begins with, and how many of those there are: all of the prompt, or none if it
/// does not begin with it. Nothing is written for tokens that are there already.
pub(crate) fn behind_prompt(list: Borrowed<'_, '_, PyAny>, prompt: &[u32]) -> (usize, Tokens) {
    if let Ok(numbers) = list.cast::<PyList>()
        && prompt.len() <= numbers.len()
        && begins_with(numbers, prompt)
        && let Some(rest) = read_behind(numbers, prompt.len())
    {
        return (prompt.len(), Tokens(Some(rest)));
    }
    (0, list.extract().unwrap_or(Tokens(None)))
}

/// A list that was read and is nobody else's. Giving back all of its numbers takes as long as reading them.
pub(crate) struct SpentList(Py<PyList>);

/// Numbers that are given back at a time, in some 30 us.
const GIVEN_BACK: usize = 4096;

impl SpentList {
    /// `None`: it is somebody else's too, so it is let go of and stays as it is.
    pub fn new(list: Bound<'_, PyAny>) -> Option<Self> {
        let list = list.cast_into::<PyList>().ok()?;
        // SAFETY: it is an object, and this thread is attached to the interpreter.
        let owners = unsafe { ffi::Py_REFCNT(list.as_ptr()) };
        (owners == 1).then(|| Self(list.unbind()))
    }

    /// Gives back a part. True: there is more.
    pub fn shorten(&mut self, py: Python<'_>) -> bool {
        let list = self.0.bind(py);
        let end = list.len();
        // What cannot be given back in parts is given back as a whole, later.
        list.del_slice(end.saturating_sub(GIVEN_BACK), end).is_ok() && end > GIVEN_BACK
    }
}

fn begins_with(list: Borrowed<'_, '_, PyList>, prompt: &[u32]) -> bool {
    let mut expected = prompt.iter();
    each(list, 0..prompt.len(), |word| expected.next().is_some_and(|token| c_ulong::from(*token) == word))
}

/// What a list has, if these are integers that fit and none is below 0.
fn read<T: TryFrom<c_ulong>>(list: Borrowed<'_, '_, PyAny>) -> Option<Vec<T>> {
    read_behind(list.cast::<PyList>().ok()?, 0)
}

fn read_behind<T: TryFrom<c_ulong>>(list: Borrowed<'_, '_, PyList>, first: usize) -> Option<Vec<T>> {
    let mut numbers = Vec::with_capacity(list.len() - first);
    let push = |word| T::try_from(word).map(|number| numbers.push(number)).is_ok();
    each(list, first..list.len(), push).then_some(numbers)
}

/// Shows the numbers of a part of a list to `takes`, until it refuses one. It has to refuse the largest: that stands for
/// what is no number from 0 to it. True: none was refused.
fn each(list: Borrowed<'_, '_, PyList>, part: Range<usize>, mut takes: impl FnMut(c_ulong) -> bool) -> bool {
    // Behind `Py_ssize_t` there is nothing.
    let index = |index: usize| ffi::Py_ssize_t::try_from(index).unwrap_or(ffi::Py_ssize_t::MAX);
    for index in index(part.start)..index(part.end) {
        // SAFETY: `list` is a list, and this thread is attached to the interpreter. An item is borrowed from the list and
        // used at once: turning an integer into a word runs nobody's code, and what is no integer is refused without
        // asking it. Behind the end, and for what does not fit, an exception is set and the word is the largest.
        let word = unsafe { ffi::PyLong_AsUnsignedLong(ffi::PyList_GetItem(list.as_ptr(), index)) };
        if !takes(word) {
            // An exception that was set, or none if the number is one that `takes` does not want.
            drop(PyErr::take(list.py()));
            return false;
        }
    }
    true
}
