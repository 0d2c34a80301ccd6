use super::*;

#[test]
fn a_name_is_the_kernels_whatever_its_dashes() {
    assert_eq!(ModuleName::new("vfio-pci").as_str(), "vfio_pci");
    assert_eq!(ModuleName::new("vfio-pci"), ModuleName::new("vfio_pci"));
}

#[test]
fn parameters_are_named_before_the_colon() {
    // As modinfo says them, each ended by a NUL; words may have lines and colons.
    let said =
        "max_vfs:Maximum number of virtual functions (uint)\0debug:Debug level:\n0..16 (int)\0";
    let names: Vec<String> = named(said).into_iter().collect();
    assert_eq!(names, ["debug", "max_vfs"]);
    assert!(named("").is_empty());
}

#[test]
fn a_module_is_loaded_by_its_name_with_its_parameters() {
    let given = [("b", "2"), ("a", "x,y")].map(|(k, v)| (k.to_owned(), v.to_owned()));
    let arguments = load_arguments(&ModuleName::new("mlx5-core"), &given.into());
    assert_eq!(arguments, ["mlx5_core", "a=x,y", "b=2"]);
}
