//! Outlier columns that a kernel lists on the device, of which the host does not know how many.

use super::Queue;
use crate::device::Device;
use crate::dtype::Scalar;
use crate::error::Result;
use crate::tensor::Tensor;
use halfbyte_gpu::ops::Outliers;

/// Memory for such a list.
pub(crate) struct Found(Option<List>);

struct List {
    /// int32, room for every column.
    columns: Tensor,
    /// int32 `[1]`.
    count: Tensor,
}

impl Found {
    /// For activations of `columns` columns; nothing unless the list is `wanted`.
    pub(crate) fn new(queue: &Queue, columns: usize, wanted: bool) -> Result<Self> {
        if !wanted {
            return Ok(Self(None));
        }
        let dtype = i32::scalar_type();
        Ok(Self(Some(List {
            columns: queue.empty(&[columns as i64], dtype)?,
            count: queue.empty(&[1], dtype)?,
        })))
    }

    /// What the launcher takes.
    pub(crate) fn outliers(&self, queue: &Queue) -> Result<Option<Outliers>> {
        let Some(List { columns, count }) = &self.0 else { return Ok(None) };
        Ok(Some(Outliers {
            columns: columns.write("outlier_cols")?.on(queue)?,
            count: count.write("outlier count")?.on(queue)?,
        }))
    }

    /// The list as it is on the device: the columns, of which the first ones count, and how many.
    pub(crate) fn list(self) -> Option<[Tensor; 2]> {
        self.0.map(|List { columns, count }| [columns, count])
    }

    /// The columns as an int64 tensor on the device, of the length that the kernel found.
    ///
    /// **This waits for the device**, because the length of a result must be known to the host:
    /// the one place where an op does. It cannot be captured in a CUDA graph. Layers do not come
    /// here (`int8_linear` and `int8_linear.listed` keep the list on the device); who asks for the
    /// columns does.
    pub(crate) fn columns(&self, queue: &Queue) -> Result<Option<Tensor>> {
        let Some(List { columns, count }) = &self.0 else { return Ok(None) };
        let host = Tensor::empty(&[1], i32::scalar_type(), Device::cpu())?;
        host.copy_from(count)?;
        let found = i64::from(host.read("outlier count")?.slice::<i32>()?[0]);
        let list = queue.empty(&[found], i64::scalar_type())?;
        list.copy_from(&columns.first(found)?)?;
        Ok(Some(list))
    }
}
