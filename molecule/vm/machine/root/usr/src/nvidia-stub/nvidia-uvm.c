/* STUB, test hosts only. Like the real one it needs nvidia, so that loading it brings nvidia along. */
#include <linux/module.h>

int stub_nvidia_is_here(void);

static int __init stub_init(void)
{
	return stub_nvidia_is_here() ? 0 : -ENODEV;
}

static void __exit stub_exit(void)
{
}

module_init(stub_init);
module_exit(stub_exit);

MODULE_DESCRIPTION("stub");
MODULE_LICENSE("Dual MIT/GPL");
MODULE_VERSION(STUB_VERSION);
