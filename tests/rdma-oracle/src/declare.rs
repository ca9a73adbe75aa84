//! The macros that the declarations are written in, of the names and forms of `ffi/src/verbs/sys/declare.rs`. There they
//! declare; here they describe.

macro_rules! structures {
    ($(
        $(#[$meta:meta])*
        struct $name:ident $relation:tt $size:literal {
            $($(#[$field_meta:meta])* $offset:literal => $field:ident: $type:ty,)*
        }
    )*) => {
        $(
            $(#[$meta])*
            #[repr(C)]
            pub(crate) struct $name {
                $($(#[$field_meta])* pub(crate) $field: $type,)*
            }
        )*

        /// The structures of this file.
        pub(crate) fn described() -> Vec<crate::Structure> {
            vec![$(
                crate::Structure {
                    name: stringify!($name),
                    size: $size,
                    align: align_of::<$name>(),
                    whole: stringify!($relation) == "=",
                    fields: vec![$(
                        crate::Field {
                            name: stringify!($field),
                            kind: stringify!($type),
                            offset: $offset,
                            size: size_of::<$type>(),
                            bound_offset: bound_offset!($name, $field),
                        },
                    )*],
                    bound_size: bound_size!($name),
                },
            )*]
        }
    };
}

macro_rules! constants {
    ($(
        $(#[$meta:meta])*
        enum $enumeration:ident: $type:ty { $($name:ident = $value:expr,)* }
    )*) => {
        /// The constants of this file.
        pub(crate) fn described() -> Vec<crate::Constant> {
            vec![$($({
                let value: $type = $value;
                crate::Constant {
                    name: stringify!($name),
                    value: i64::from(value),
                    bound_value: bound_value!($enumeration, $name),
                }
            },)*)*]
        }
    };
}

macro_rules! functions {
    (
        $(#[$meta:meta])*
        struct $table:ident {
            $($(#[$function_meta:meta])*
            fn $function:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)?;)*
        }
    ) => {
        $(#[$meta])*
        pub(crate) struct $table;

        impl $table {
            /// The functions of this table.
            pub(crate) fn described() -> Vec<crate::Function> {
                vec![$(
                    crate::Function {
                        name: stringify!($function),
                        arguments: vec![$(stringify!($type)),*],
                        result: concat!($(stringify!($result))?),
                        prototype: std::any::type_name::<unsafe extern "C" fn($($type),*) $(-> $result)?>(),
                        bound_prototype: bound_prototype!($function($($argument),*)),
                    },
                )*]
            }
        }
    };
}
