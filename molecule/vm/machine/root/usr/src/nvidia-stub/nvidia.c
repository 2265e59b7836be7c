/* STUB of NVIDIA's driver, test hosts only: it is loaded and does nothing. */
#include <linux/module.h>

int stub_nvidia_is_here(void);
int stub_nvidia_is_here(void)
{
	return 1;
}
EXPORT_SYMBOL_GPL(stub_nvidia_is_here);

MODULE_DESCRIPTION("stub");
MODULE_LICENSE("Dual MIT/GPL");
MODULE_VERSION(STUB_VERSION);
