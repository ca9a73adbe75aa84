//! What both judges say, and that they do say something.

use super::*;

#[test]
fn the_headers_agree_with_every_declaration() {
    let declarations = declarations();
    let fields: usize = declarations.structures.iter().map(|structure| structure.fields.len()).sum();
    println!(
        "{} structures, {fields} fields, {} constants, {} functions",
        declarations.structures.len(),
        declarations.constants.len(),
        declarations.functions.len()
    );
    if let Err(error) = headers::judge(&declarations) {
        panic!("the headers say otherwise:\n{error}");
    }
}

/// What the headers say about declarations that `change` has made wrong.
fn objection(change: impl FnOnce(&mut Declarations)) -> String {
    let mut wrong = declarations();
    change(&mut wrong);
    headers::judge(&wrong).expect_err("a wrong declaration passed").to_string()
}

fn structure<'a>(declarations: &'a mut Declarations, name: &str) -> &'a mut Structure {
    declarations.structures.iter_mut().find(|structure| structure.name == name).expect("it is declared")
}

fn field<'a>(declarations: &'a mut Declarations, of: &str, name: &str) -> &'a mut Field {
    structure(declarations, of).fields.iter_mut().find(|field| field.name == name).expect("it is declared")
}

#[test]
fn a_wrong_size_is_objected_to() {
    let said = objection(|wrong| structure(wrong, "ibv_wc").size = 56);
    assert!(said.contains("ibv_wc is declared with 56 bytes") && said.lines().count() == 1, "{said}");
    let said = objection(|wrong| structure(wrong, "rdma_cm_id").size = 4096);
    assert!(said.contains("rdma_cm_id is declared with at least 4096 bytes"), "{said}");
}

#[test]
fn a_wrong_offset_is_objected_to_also_in_a_union() {
    let said = objection(|wrong| field(wrong, "ibv_send_wr", "rkey").offset = 52);
    assert!(said.contains("ibv_send_wr.wr.rdma.rkey is declared as u32 at byte 52"), "{said}");
    let said = objection(|wrong| field(wrong, "ibv_context_ops", "post_send").offset = 208);
    assert!(said.contains("ibv_context_ops.post_send"), "{said}");
}

#[test]
fn a_wrong_type_is_objected_to() {
    let said = objection(|wrong| field(wrong, "ibv_cq", "cqe").kind = "c_uint");
    assert!(said.contains("the type: ibv_cq.cqe is declared as c_uint"), "{said}");
    let said = objection(|wrong| field(wrong, "ibv_qp", "recv_cq").kind = "*mut ibv_qp");
    assert!(said.contains("the type: ibv_qp.recv_cq"), "{said}");
}

#[test]
fn a_wrong_constant_is_objected_to() {
    let said = objection(|wrong| wrong.constants[0].value += 1);
    assert!(said.contains("IBV_TRANSPORT_IB is declared as 1"), "{said}");
}

#[test]
fn a_wrong_prototype_is_objected_to() {
    let said = objection(|wrong| {
        let function = wrong.functions.iter_mut().find(|function| function.name == "ibv_create_cq");
        function.expect("it is declared").arguments.swap(1, 2);
    });
    assert!(said.contains("ibv_create_cq is declared as struct ibv_cq *"), "{said}");
}

/// The bindings, where they were made.
#[cfg(feature = "rdma-sys")]
mod bound {
    use super::*;

    /// A type without the paths in it.
    fn plain(name: &str) -> String {
        let words = name.split_inclusive(|letter: char| !(letter.is_alphanumeric() || "_:".contains(letter)));
        words.map(|word| word.rsplit("::").next().expect("at least one part")).collect()
    }

    #[test]
    fn the_bindings_agree_with_every_layout() {
        let mut compared = 0;
        for Structure { name, size, whole, fields, bound_size, .. } in declarations().structures {
            let bound = bound_size.expect("every structure is bound");
            assert!(
                if whole { bound == size } else { bound >= size },
                "{name} has {bound} bytes, not {size}"
            );
            for field in fields {
                let Some(bound) = field.bound_offset else {
                    assert!(field.name.starts_with('_'), "{name}.{} is not compared", field.name);
                    continue;
                };
                assert_eq!(bound, field.offset, "offset of {name}.{}", field.name);
                compared += 1;
            }
        }
        println!("{compared} fields are where the bindings have them");
    }

    #[test]
    fn the_bindings_agree_with_every_constant() {
        for Constant { name, value, bound_value } in declarations().constants {
            match bound_value {
                Some(bound) => assert_eq!(bound, value, "{name}"),
                None => assert!(name.starts_with("IBV_LINK_LAYER_"), "{name} is not compared"),
            }
        }
    }

    #[test]
    fn the_bindings_agree_with_every_prototype() {
        for Function { name, prototype, bound_prototype, .. } in declarations().functions {
            // The first is not bound; the second has a name of its own for the structure.
            match (name, bound_prototype) {
                ("_ibv_query_gid_table", None) => {}
                ("ibv_query_port", Some(bound)) => {
                    assert_eq!(
                        plain(prototype),
                        plain(bound).replace("_compat_ibv_port_attr", "ibv_port_attr")
                    );
                }
                (_, bound) => assert_eq!(Some(plain(prototype)), bound.map(plain), "{name}"),
            }
        }
    }
}
