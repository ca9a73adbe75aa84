//! The macros that `structures`, `constants` and `functions` are written in.
//!
//! `tests/rdma-oracle` has macros of the same names and forms, which compare instead of declaring.

/// Structures with the layout of C. `= N`: the whole structure of N bytes; `>= N`: its first N bytes, for one that only
/// the library allocates. Before each field stands its offset. A field whose name starts with `_` is only room.
macro_rules! structures {
    ($(
        $(#[$meta:meta])*
        struct $name:ident $relation:tt $size:literal {
            $($(#[$field_meta:meta])* $offset:literal => $field:ident: $type:ty,)*
        }
    )*) => {$(
        $(#[$meta])*
        #[repr(C)]
        pub(in crate::verbs) struct $name {
            $($(#[$field_meta])* pub(in crate::verbs) $field: $type,)*
        }

        const _: () = {
            assert!(size_of::<$name>() == $size, concat!("size of ", stringify!($name)));
            $(assert!(
                std::mem::offset_of!($name, $field) == $offset,
                concat!("offset of ", stringify!($name), ".", stringify!($field))
            );)*
        };
    )*};
}

/// The constants of a C enumeration, or those of them that are used; as numbers, since a library newer than this program
/// may say others.
macro_rules! constants {
    ($(
        $(#[$meta:meta])*
        enum $enumeration:ident: $type:ty { $($name:ident = $value:expr,)* }
    )*) => {$($(
        #[doc = concat!("Of `", stringify!($enumeration), "`.")]
        pub(in crate::verbs) const $name: $type = $value;
    )*)*};
}

/// A table of the functions that are used of one library, and a method for each.
macro_rules! functions {
    (
        $(#[$meta:meta])*
        struct $table:ident {
            $($(#[$function_meta:meta])*
            fn $function:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)?;)*
        }
    ) => {
        $(#[$meta])*
        pub(in crate::verbs) struct $table {
            $($function: unsafe extern "C" fn($($type),*) $(-> $result)?,)*
        }

        impl $table {
            /// Finds every function in `library`; the error is the name of the first that is not there.
            ///
            /// # Safety
            /// `library` is the one that this table is declared for, and is never unloaded.
            pub(super) unsafe fn find(library: &libloading::os::unix::Library) -> Result<Self, &'static str> {
                Ok(Self {$(
                    $function: {
                        type Function = unsafe extern "C" fn($($type),*) $(-> $result)?;
                        // SAFETY: the caller says which library it is, and there the name stands for a function of
                        // this prototype (`tests/rdma-oracle` compares it with the header). A symbol without an
                        // address is `None`.
                        let found = unsafe { library.get::<Option<Function>>(stringify!($function)) };
                        found.ok().and_then(|symbol| *symbol).ok_or(stringify!($function))?
                    },
                )*})
            }

            $(
                $(#[$function_meta])*
                ///
                /// # Safety
                /// As the manual page of the function says.
                pub(in crate::verbs) unsafe fn $function(&self, $($argument: $type),*) $(-> $result)? {
                    // SAFETY: the pointer is the function's, of a library that stays loaded; the rest is upheld by the
                    // caller.
                    unsafe { (self.$function)($($argument),*) }
                }
            )*
        }
    };
}
