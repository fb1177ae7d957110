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

/// What a list has, if these are integers that fit and none is below 0.
fn read<T: TryFrom<c_ulong>>(list: Borrowed<'_, '_, PyAny>) -> Option<Vec<T>> {
    let list = list.cast::<PyList>().ok()?;
    let indices: Range<ffi::Py_ssize_t> = 0..list.len().try_into().ok()?;
    let mut numbers = Vec::with_capacity(list.len());
    for index in indices {
        // SAFETY: `list` is a list, and this thread is attached to the interpreter. An item is borrowed from the list and
        // used at once: turning an integer into a word runs nobody's code, and what is no integer is refused without
        // asking it. Behind the end, and for what does not fit, an exception is set and the word is the largest.
        let word = unsafe { ffi::PyLong_AsUnsignedLong(ffi::PyList_GetItem(list.as_ptr(), index)) };
        match T::try_from(word) {
            Ok(number) => numbers.push(number),
            Err(_) => {
                // An exception that was set, or none if the number is one of 64 bits.
                drop(PyErr::take(list.py()));
                return None;
            }
        }
    }
    Some(numbers)
}
